"""The lectures' headline experiment: one linear neuron on two Gaussians, and which λ_max bounds its rate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import curvature, data, losses, nn, training
from jaxnet.contract import Array
from jaxnet.lab.record import Claim, Contours, Panel, Record, Series, above, below, close, within

QUESTION = "A linear neuron on two Gaussians: is its largest batch rate 2.38, as λ_max = .84 says?"

RATES = (1.5, 2.38, 2.5)
STOCHASTIC_RATE = 0.2


def weights_only(kernel: Array, batch: tuple[Array, Array]) -> Array:
    """E = ½ mean (d − w·x)² of the neuron without its bias: the lectures' Hessian."""
    return jnp.mean(losses.squared_error(batch[0] @ kernel, batch[1]))


NEURON = nn.linear_neuron()
WITH_BIAS = losses.mean_loss(NEURON.apply, losses.squared_error)


def run(*, seed: int = 0, num_examples: int = 100, num_steps: int = 20, num_draws: int = 200) -> Record:
    """λ_max of the weights' block and of the whole, growth at four batch rates, and a stochastic run at η = .2."""
    with jax.enable_x64(True):
        return _run(seed, num_examples, num_steps, num_draws)


def _run(seed: int, num_examples: int, num_steps: int, num_draws: int) -> Record:
    batch = data.two_gaussians_exact(num_examples)
    kernel, params = jnp.array([-0.25, 2.2]), {"kernel": jnp.array([[-0.25], [2.2]]), "bias": jnp.array([0.5])}
    key = jax.random.key(seed)
    block = _eigenvalues(weights_only, kernel, batch, key)
    full = _eigenvalues(WITH_BIAS, params, batch, key)
    draws = _draws(key, num_examples, num_draws)
    claims = [
        close("largest_of_block", "λ_max of the weights' block", 0.84, block[0], 1e-10),
        close("smallest_of_block", "λ_min of the weights' block", 0.04, block[-1], 1e-10),
        close("largest_with_bias", "λ_max with the bias", 1.0, full[0], 1e-10),
        close(
            "largest_over_draws",
            "λ_max of the block, mean over random draws",
            0.84,
            draws.mean(),
            4 * draws.std() / num_draws**0.5,
        ),
        *_growth_claims(kernel, params, batch),
    ]
    paths = {rate: _descend(weights_only, kernel, batch, rate, num_steps) for rate in RATES}
    biased = {rate: _descend(WITH_BIAS, params, batch, rate, num_steps) for rate in RATES}
    stochastic, errors = _stochastic(kernel, batch, key)
    claims.append(below("stochastic_trains", "stochastic at η = .2 trains: E after 10 epochs", errors[0], errors[-1]))
    return Record(
        name="two_gaussians",
        question=QUESTION,
        config={"num_examples": num_examples, "num_steps": num_steps, "num_draws": num_draws},
        seed=seed,
        dtype="float64",
        measurements={
            "block_eigenvalues": block,
            "full_eigenvalues": full,
            "block_sharpness_mean": draws.mean(),
            "block_sharpness_std": draws.std(),
            "maximal_rate_of_block": 2 / block[0],
            "maximal_rate": 2 / full[0],
        },
        claims=claims,
        panels=[
            _path_panel("batch_paths", "Batch paths of the weights at three rates", paths, batch),
            _path_panel(
                "stochastic_path",
                "Stochastic path of the weights, two epochs",
                {STOCHASTIC_RATE: stochastic},
                batch,
            ),
            _error_panel("errors_weights_only", "Batch error, weights only: 2/λ_max = 2.38 is the limit", paths),
            _error_panel("errors_with_bias", "Batch error with the bias: λ_max = 1, the limit is 2", biased),
            Panel(
                name="stochastic_errors",
                title="Stochastic error at η = .2: it falls at once, then keeps bouncing",
                xlabel="epoch",
                ylabel="E on all examples",
                series=[Series("B = 1, η = 0.2", np.arange(len(errors)), errors, "line-points")],
                yscale="log",
            ),
        ],
    )


def _eigenvalues(loss: Any, params: Any, batch: Any, key: Array) -> np.ndarray:
    size = sum(x.size for x in jax.tree.leaves(params))
    op = curvature.hessian(loss, params, batch)
    return np.asarray(curvature.eigsh(op, size, key=key, tol=1e-12).values)


def _draws(key: Array, num_examples: int, num_draws: int) -> np.ndarray:
    def one(key: Array) -> Array:
        inputs, _ = data.two_gaussians(key=key, num_examples=num_examples)
        return jnp.linalg.eigvalsh(inputs.T @ inputs / num_examples)[-1]

    return np.asarray(jax.vmap(one)(jax.random.split(key, num_draws)))


@jax.jit(static_argnames=("loss", "num_steps"))
def _descend(loss: Any, params: Any, batch: Any, rate: Array | float, num_steps: int) -> tuple[Any, Array]:
    """The path of full-batch gradient descent, and E along it."""
    optimizer = optax.sgd(rate)
    update = training.make_update(loss, optimizer)

    def step(state: training.TrainState, batch: Any) -> tuple[training.TrainState, tuple[Any, Array]]:
        after, metrics = update(state, batch)
        return after, (state.params, metrics["loss"])

    return training.trajectory(step, training.init_state(params, optimizer), batch, num_steps=num_steps + 1)[1]


@jax.jit
def walk(start: Array, batch: tuple[Array, Array], rate: Array | float, rows: Array) -> Array:
    """The weights (T + 1, 2) along T steps, of which step t sees the examples ``rows[t]``."""
    optimizer = optax.sgd(rate)
    update = training.make_update(lambda w, row: weights_only(w, jax.tree.map(lambda x: x[row], batch)), optimizer)
    state = training.init_state(start, optimizer)
    _, path = training.trajectory(update, state, rows, observe=lambda state, _: state.params)
    return jnp.concatenate([start[None], path])


def _growth(loss: Any, params: Any, batch: Any, rate: float) -> float:
    """The factor a step of the excess loss E − E*, once its fastest mode is alone."""
    floor = float(weights_only(minimum_of_weights(batch), batch))
    values = np.asarray(_descend(loss, params, batch, rate, 60)[1]) - floor
    # On the way down, rounding of E* ends the ratio's meaning: take the last clear one.
    clear = np.flatnonzero(values > 1e-9 * max(values[0], floor))
    return float(values[clear[-1]] / values[clear[-1] - 1])


def minimum_of_weights(batch: tuple[Array, Array]) -> Array:
    """Where `weights_only` is least."""
    inputs, targets = batch
    return jnp.linalg.solve(inputs.T @ inputs, inputs.T @ targets)


def minimum_with_bias(batch: tuple[Array, Array]) -> dict[str, Array]:
    """Where `WITH_BIAS` is least."""
    inputs, targets = batch
    weights = jnp.linalg.lstsq(jnp.column_stack([inputs, jnp.ones_like(targets)]), targets)[0]
    return {"kernel": weights[:-1, None], "bias": weights[-1:]}


def _growth_claims(kernel: Array, params: Any, batch: Any) -> list[Claim]:
    block = lambda rate: _growth(weights_only, kernel, batch, rate)
    whole = lambda rate: _growth(WITH_BIAS, params, batch, rate)
    factor = lambda rate, *eigenvalues: max((1 - rate * value) ** 2 for value in eigenvalues)
    return [
        within(
            "growth_of_block_at_1_5",
            "η = 1.5, weights only: factor of E − E*",
            factor(1.5, 0.04, 0.84),
            block(1.5),
            1e-3,
        ),
        within("growth_of_block_at_2_5", "η = 2.5, weights only: factor of E − E*", 1.21, block(2.5), 1e-3),
        within("growth_with_bias_at_2_5", "η = 2.5, with the bias", 2.25, whole(2.5), 1e-3),
        below("growth_of_block_at_2_2", "η = 2.2, weights only, dies", 1.0, block(2.2)),
        above("growth_with_bias_at_2_2", "η = 2.2, 'admissible' by the block, with the bias grows", 1.0, whole(2.2)),
        within(
            "growth_of_block_at_20",
            "η = .2 × 100 = 20 as a batch rate, weights only",
            factor(20, 0.84),
            block(20.0),
            1e-3,
        ),
        within("growth_with_bias_at_20", "η = 20 as a batch rate, with the bias", 361.0, whole(20.0), 1e-3),
    ]


def _stochastic(kernel: Array, batch: Any, key: Array) -> tuple[tuple[Array, np.ndarray], np.ndarray]:
    """Two epochs of single steps as a path, and ten epochs of E."""
    rows = jnp.concatenate([data.reshuffled(key, epoch, len(batch[1])) for epoch in range(2)])
    path = walk(kernel, batch, STOCHASTIC_RATE, rows[:, None])
    result = training.fit(
        weights_only, kernel, batch, optax.sgd, learning_rate=STOCHASTIC_RATE, batch_size=1, num_epochs=10, key=key,
        metrics={"error": weights_only},
    )  # fmt: skip
    errors = np.append(float(weights_only(kernel, batch)), result.history.metrics["error"])
    return (path, np.array([])), errors


def _path_panel(name: str, title: str, paths: dict[float, Any], batch: Any) -> Panel:
    centre = np.asarray(minimum_of_weights(batch))
    across, up = np.linspace(-2.4, 2.4, 61) + centre[0], np.linspace(-2.4, 2.4, 61) + centre[1]
    grid = jnp.stack(jnp.meshgrid(jnp.asarray(across), jnp.asarray(up)), axis=-1)
    z = jax.vmap(jax.vmap(lambda w: weights_only(w, batch)))(grid)
    series = []
    for rate, (path, _) in paths.items():
        points = np.asarray(path).reshape(-1, 2)
        inside = (np.abs(points - centre) <= 2.4).all(axis=1)
        shown = points[: int(np.argmin(inside)) if not inside.all() else len(points)]
        series.append(Series(f"η = {rate:g}", shown[:, 0], shown[:, 1], "line-points"))
    series.append(Series("minimum", centre[:1], centre[1:], "points", 6))
    return Panel(name, title, "weight w₁", "weight w₂", series, contours=Contours(across, up, z, "E, weights only"))


def _error_panel(name: str, title: str, paths: dict[float, Any]) -> Panel:
    series = [Series(f"η = {rate:g}", np.arange(len(e)), e, "line-points") for rate, (_, e) in paths.items()]
    return Panel(name, title, "step (epoch)", "E", series, yscale="log")
