"""A wide linear network beyond 2/λ₀: thrown out of the steep place where it starts, it lands in a flat one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import curvature, data, losses, training
from jaxnet.contract import Array, ArrayTree
from jaxnet.lab.record import Line, Panel, Record, Series, above, below, close, within

QUESTION = "What becomes of a wide network at a rate beyond its limit of stability, 2/λ?"

# ηλ₀: below the limit, between it and twice it, and beyond; closer together around 4.
RATIOS = np.union1d(np.round(np.arange(0.1, 4.51, 0.05), 2), np.round(np.arange(3.8, 4.21, 0.02), 2))
LAZY, CATAPULT, BEYOND = RATIOS < 1.6, (RATIOS > 2.2) & (RATIOS < 3.96), RATIOS > 4.09
DRAWN = (1.0, 2.5, 3.5, 3.95, 4.1)
STEPS_DRAWN = 30


def two_layers(params: ArrayTree, inputs: Array) -> Array:
    """f(x) = v·(Ux)/√n: all entries start from N(0, 1), so that curvature is of order 1 at any width n."""
    return inputs @ params["u"] @ params["v"] / params["v"].size ** 0.5


LOSS = losses.mean_loss(two_layers, losses.squared_error)


class Runs(NamedTuple):
    """(R, T + 1) the loss from step 0 on, and (R,) λ at the end."""

    loss: np.ndarray
    curvature: np.ndarray


def run(*, seed: int = 0, num_examples: int = 50, width: int = 1024, num_steps: int = 300) -> Record:
    """Gradient descent on two Gaussians at ηλ₀ from .1 to 4.5, and on one example against its recursion."""
    if num_steps < STEPS_DRAWN:
        raise ValueError(f"num_steps: expected {STEPS_DRAWN} or more, got {num_steps}")
    with jax.enable_x64(True):
        return _run(seed, num_examples, width, num_steps)


def _run(seed: int, num_examples: int, width: int, num_steps: int) -> Record:
    data_key, init_key, key = jax.random.split(jax.random.key(seed), 3)
    batch = data.two_gaussians(key=data_key, num_examples=num_examples)
    params = _init(init_key, batch[0].shape[1], width)
    start = float(_curvature(params, batch))
    runs = _descend(params, batch, start, num_steps)
    floor = _least_squares(batch)
    left = (runs.loss[:, -1] - floor) / (runs.loss[:, 0] - floor)
    landed = RATIOS * runs.curvature / start
    diverged = ~np.isfinite(runs.loss[:, -1])
    measured, recursion = _one_example(width, init_key, num_steps)
    claims = [
        close(
            "one_example_recursion",
            "one example: λ at the end against its recursion, largest relative difference",
            0,
            np.abs(measured / recursion - 1)[RATIOS < 3.96].max(),
            1e-8,
        ),
        below(
            "lazy_keeps_curvature",
            "below 2: λ at the end differs from λ₀ by, relative",
            0.02,
            np.abs(landed / RATIOS - 1)[LAZY].max(),
        ),
        above(
            "catapult_rises",
            "2 to 4: the loss first rises by a factor of, at least",
            1,
            (runs.loss.max(1) / runs.loss[:, 0])[CATAPULT].min(),
        ),
        below(
            "catapult_converges",
            "2 to 4: then it falls to the minimum; what is left of its excess",
            0.01,
            left[CATAPULT].max(),
        ),
        below("catapult_lands_below_2", "2 to 4: ηλ at the end", 2, landed[CATAPULT].max()),
        close("beyond_diverges", "beyond 4: share of the rates that diverge", 1, diverged[BEYOND].mean(), 0),
        within(
            "smallest_diverging",
            "ηλ₀ of the smallest rate that diverges",
            4,
            RATIOS[diverged].min(initial=np.inf),
            0.02,
        ),
    ]
    return Record(
        name="catapult",
        question=QUESTION,
        config={"num_examples": num_examples, "width": width, "num_steps": num_steps},
        seed=seed,
        dtype="float64",
        measurements={
            "initial_curvature": start,
            "ratios": RATIOS,
            "final_ratios": landed,
            "final_ratios_one_example": measured,
            "final_loss": runs.loss[:, -1],
        },
        claims=claims,
        panels=[
            *_path_panels(start, *_follow(params, batch, jnp.array(DRAWN) / start, key)),
            _landing_panel(landed, measured),
        ],
        rows=[
            (
                f"ηλ at the end, from ηλ₀ = {ratio:g}",
                float(end),
                f"loss at most {high:.3g} on the way, {last:.3g} at the end",
            )
            for ratio, end, high, last in zip(RATIOS, landed, runs.loss.max(1), runs.loss[:, -1], strict=True)
            if ratio in DRAWN and np.isfinite(end)
        ],
    )


def _init(key: Array, num_inputs: int, width: int) -> ArrayTree:
    keys = jax.random.split(key)
    return {"u": jax.random.normal(keys[0], (num_inputs, width)), "v": jax.random.normal(keys[1], (width,))}


def _curvature(params: ArrayTree, batch: Any) -> Array:
    """λ, the largest eigenvalue of the tangent kernel JJ′/N, which is that of the Gauss–Newton matrix J′J/N."""
    jacobian = jax.jacobian(two_layers)(params, batch[0])
    rows = jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(jacobian)], axis=1)
    return jnp.linalg.eigvalsh(rows @ rows.T / len(rows))[-1]


@jax.jit(static_argnames="num_steps")
def _trained(params: ArrayTree, batch: Any, rates: Array, num_steps: int) -> tuple[Array, Array]:
    def one(rate: Array) -> tuple[Array, Array]:
        optimizer = optax.sgd(rate)
        update, state = training.make_update(LOSS, optimizer), training.init_state(params, optimizer)
        state, metrics = training.trajectory(update, state, batch, num_steps=num_steps)
        return jnp.append(metrics["loss"], LOSS(state.params, batch)), _curvature(state.params, batch)

    return jax.lax.map(one, rates)


def _descend(params: ArrayTree, batch: Any, start: float, num_steps: int) -> Runs:
    return Runs(*map(np.asarray, _trained(params, batch, jnp.asarray(RATIOS / start), num_steps)))


def _least_squares(batch: Any) -> float:
    inputs, targets = map(np.asarray, batch)
    fitted = inputs @ np.linalg.lstsq(inputs, targets, rcond=None)[0]
    return float(((fitted - targets) ** 2).mean() / 2)


def _one_example(width: int, key: Array, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """ηλ at the end of the network trained on x = 1, t = 0, and of two numbers alone.

    f ← f (1 − ηλ + η²f²/n) and λ ← λ + ηf²(ηλ − 4)/n: below 4, λ can only fall; it does so while f is large.
    """
    params, example = _init(key, 1, width), (jnp.ones((1, 1)), jnp.zeros(1))
    output, start = float(two_layers(params, example[0])[0]), float(_curvature(params, example))
    rates = RATIOS / start
    runs = _descend(params, example, start, num_steps)
    f, value = np.full_like(rates, output), np.full_like(rates, start)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(num_steps):  # A recurrence of two numbers: there is nothing to train.
            f, value = (
                f * (1 - rates * value + rates**2 * f**2 / width),
                value + rates * f**2 * (rates * value - 4) / width,
            )
    return rates * runs.curvature, rates * value


@jax.jit
def _follow(params: ArrayTree, batch: Any, rates: Array, key: Array) -> tuple[Array, Array]:
    """(R, T) the loss and the Hessian's λ_max at the first steps."""

    def one(rate: Array) -> tuple[Array, Array]:
        optimizer = optax.sgd(rate)
        update = training.make_update(LOSS, optimizer)

        def step(state: training.TrainState, batch: Any) -> tuple[training.TrainState, tuple[Array, Array]]:
            top = curvature.eigsh(curvature.hessian(LOSS, state.params, batch), key=key).values[0]
            state, metrics = update(state, batch)
            return state, (metrics["loss"], top)

        return training.trajectory(step, training.init_state(params, optimizer), batch, num_steps=STEPS_DRAWN)[1]

    return jax.lax.map(one, rates)


def _path_panels(start: float, loss: Array, sharpness: Array) -> list[Panel]:
    steps = np.arange(STEPS_DRAWN)
    # What diverges is drawn as far as it is on the scale of the others.
    shown = lambda y: np.where(np.asarray(loss) < 1e4, np.asarray(y), np.nan)
    label = lambda ratio: f"η λ₀ = {ratio:g}"
    return [
        Panel(
            name="loss_against_step",
            title="Between 2 and 4 the loss first rises, then falls; beyond 4 it never comes back",
            xlabel="step",
            ylabel="loss, mean of ½(o − t)²",
            series=[Series(label(r), steps, y, "line-points") for r, y in zip(DRAWN, shown(loss), strict=True)],
            yscale="log",
        ),
        Panel(
            name="sharpness_against_step",
            title="While the loss is high, curvature falls to where the rate is stable",
            xlabel="step",
            ylabel="η λ_max of the Hessian",
            series=[
                Series(label(r), steps, r / start * y, "line-points")
                for r, y in zip(DRAWN, shown(sharpness), strict=True)
            ],
            lines=[Line("limit of stability", 2.0, axis="y")],
        ),
    ]


def _landing_panel(on_gaussians: np.ndarray, on_one_example: np.ndarray) -> Panel:
    return Panel(
        name="landing",
        title="Below 2 curvature stays as it is; from 2 to 4 it lands somewhere under the limit",
        xlabel="η λ₀ at the start",
        ylabel="η λ at the end",
        series=[
            Series("two Gaussians", RATIOS, on_gaussians, "points"),
            Series("one example", RATIOS, on_one_example, "points"),
            Series("unchanged", [0, 4], [0, 4], "dashed", 6),
        ],
        lines=[Line("limit of stability", 2.0, axis="y", colour=2), Line("η λ₀ = 4", 4.0)],
    )
