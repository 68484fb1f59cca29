"""Gradient descent on a parabola: the four regimes of the learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import curvature, learning_rate, training
from jaxnet.contract import Array
from jaxnet.lab.record import Panel, Record, Series, close, slug

QUESTION = "In one dimension, what does each learning rate do to the distance from the minimum?"

RATIOS = (0.1, 0.5, 1.0, 1.5, 2.0, 2.1)
MINIMUM = 1.7


def parabola(params: Array, batch: tuple[Array]) -> Array:
    """E(ω) = mean of ½ a (ω − ω*)² over the curvatures a of the batch."""
    return jnp.mean(0.5 * batch[0] * (params - MINIMUM) ** 2)


def run(*, seed: int = 0, curvature_of_loss: float = 3.2, num_steps: int = 12) -> Record:
    """The error shrinks by 1 − η/η_opt a step: to 0 at η_opt, by half at half of it, not at all at 2η_opt."""
    if not curvature_of_loss > 0:
        raise ValueError(f"curvature_of_loss: expected a positive number, got {curvature_of_loss}")
    with jax.enable_x64(True):
        return _run(seed, curvature_of_loss, num_steps)


def _run(seed: int, a: float, num_steps: int) -> Record:
    batch, start = (jnp.full((1,), a),), jnp.asarray(MINIMUM + 1.0)
    sharp = curvature.sharpness(parabola, start, batch, key=jax.random.key(seed))
    optimum = float(learning_rate.optimal(sharp.value))
    claims = [
        close("optimal_rate", "η_opt is the inverse of ∂²E/∂ω²", 1 / a, optimum, 1e-12),
        close("maximal_rate", "η_max is 2η_opt", 2 / a, learning_rate.maximal(sharp.value), 1e-12),
    ]
    series, factors = [], {}
    for ratio in RATIOS:
        optimizer = optax.sgd(ratio * optimum)
        update, state = training.make_update(parabola, optimizer), training.init_state(start, optimizer)
        error = lambda state, _: state.params - MINIMUM
        errors = [1.0, *training.trajectory(update, state, batch, num_steps=num_steps, observe=error)[1].tolist()]
        factor = errors[1] / errors[0]
        factors[str(ratio)] = factor
        claims.append(close(slug("factor_at", ratio), f"error factor a step at {ratio} η_opt", 1 - ratio, factor, 1e-6))
        series.append(
            Series(
                f"η = {ratio} η_opt: × {1 - ratio:.2g} a step",
                np.arange(num_steps + 1),
                errors,
                "line-points",
            )
        )
        if ratio == 2.0:
            claims.append(
                close("returns_at_2", "at 2η_opt the error returns after two steps", errors[0], errors[2], 1e-6)
            )
    panel = Panel(
        name="error_against_step",
        title=f"Distance from the minimum of a parabola of curvature {a:g}, six rates",
        xlabel="step",
        ylabel="ω − ω*",
        series=series,
    )
    return Record(
        name="one_dimension",
        question=QUESTION,
        config={"curvature_of_loss": a, "num_steps": num_steps},
        seed=seed,
        dtype="float64",
        measurements={"sharpness": sharp.value, "factors": factors},
        claims=claims,
        panels=[panel],
    )
