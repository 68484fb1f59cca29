"""Data that repeat themselves: what a full-batch step wastes, over tolerances and numbers of copies."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import data, training
from jaxnet.contract import Array
from jaxnet.lab.experiments.two_gaussians import minimum_of_weights, weights_only
from jaxnet.lab.record import Claim, Line, Panel, Record, Series, above, below, close

QUESTION = "On redundant data, is the full batch at least 10 times slower than stochastic steps?"

TOLERANCES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
GENERAL, ZERO = "a general start", "a start at 0"
STARTS = {GENERAL: (-0.25, 2.2), ZERO: (0.0, 0.0)}
BATCH_RATES = np.linspace(0.04, 2.6, 65)
BATCH_STEPS = 100
WINDOW = 100
Batch = tuple[Array, Array]


def decayed(step: Array) -> Array:
    """η_t = η₀/(1 + η₀λ_min t), with the lectures' η₀ = .2 and the smallest curvature λ_min = .04.

    Reference:
      Bottou, "Stochastic Gradient Descent Tricks", 2012, section 5.2.
    """
    return 0.2 / (1 + 0.2 * 0.04 * step)


def run(
    *,
    seed: int = 0,
    num_examples: int = 100,
    copies: Sequence[int] = (1, 3, 10, 30, 100),
    num_draws: int = 20,
    num_steps: int = 20_000,
) -> Record:
    """Gradients of examples to E* (1 + ε): full batch at the best of 65 rates over single examples at a decayed rate.

    The data are R copies of N examples of the two Gaussians, the neuron has two weights. A stochastic run has reached
    a level when the mean of E over a window of 100 steps, and over every later one, is below it: that alone takes 100
    gradients.
    """
    if not {1, 10} <= set(copies):
        raise ValueError(f"copies: expected 1 and 10 among them, got {copies}")
    with jax.enable_x64(True):
        return _run(seed, num_examples, tuple(copies), num_draws, num_steps)


def _run(seed: int, num_examples: int, copies: tuple[int, ...], num_draws: int, num_steps: int) -> Record:
    draw_key, key = jax.random.split(jax.random.key(seed))
    draw = lambda key: data.two_gaussians(key=key, num_examples=num_examples)
    draws = jax.vmap(draw)(jax.random.split(draw_key, num_draws))
    levels = np.asarray(jax.vmap(_floor)(draws))[:, None] * (1 + np.array(TOLERANCES))
    keys = jax.random.split(key, num_draws)
    found = {name: _compare(jnp.array(start), draws, levels, keys, copies, num_steps) for name, start in STARTS.items()}
    ratios = {name: ratio for name, (ratio, _) in found.items()}
    medians = {name: np.median(ratio, axis=1) for name, ratio in ratios.items()}
    ten = {name: ratio[copies.index(10)] for name, ratio in ratios.items()}
    one = jax.tree.map(lambda x: x[0], draws)
    return Record(
        name="redundancy",
        question=QUESTION,
        config={"num_examples": num_examples, "copies": copies, "num_draws": num_draws, "num_steps": num_steps},
        seed=seed,
        dtype="float64",
        measurements={"tolerances": TOLERANCES, "copies": copies, "ratios": ratios},
        claims=[*_identities(one, key), *_ratio_claims(medians, copies)],
        rows=[*_rows(ten), *_power_rows(medians, copies)],
        panels=[
            _tolerance_panel(ten),
            _copies_panel(medians, copies),
            _example_panel(*found[GENERAL][1], float(_floor(one)), 10 * num_examples),
        ],
    )


def _compare(
    start: Array, draws: Batch, levels: np.ndarray, keys: Array, copies: tuple[int, ...], num_steps: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Gradients of the full batch over those of single examples, (copies, draws, levels).

    Also E along both for the first draw: at each rate of the full batch, and stochastic on 10 copies.
    """
    n = draws[1].shape[1]
    whole = np.asarray(jax.vmap(lambda batch: _full_batch(start, batch))(draws))
    steps = _first_below(whole, levels)
    single = {}
    for times in copies:
        orders = jax.vmap(lambda key: _order(key, n, times, num_steps))(keys)
        single[times] = np.asarray(jax.vmap(lambda batch, rows: _stochastic(start, batch, rows))(draws, orders))
    ratios = [steps * n * times / _held(curves, levels) for times, curves in single.items()]
    return np.stack(ratios), (whole[0], single[10][0])


@jax.jit
def _full_batch(start: Array, batch: Batch) -> Array:
    """E along gradient descent on all examples, (rates, steps + 1)."""

    def one(rate: Array) -> Array:
        optimizer = optax.sgd(rate)
        update, state = training.make_update(weights_only, optimizer), training.init_state(start, optimizer)
        return training.trajectory(update, state, batch, num_steps=BATCH_STEPS + 1)[1]["loss"]

    return jax.vmap(one)(jnp.asarray(BATCH_RATES))


@jax.jit
def _stochastic(start: Array, batch: Batch, rows: Array) -> Array:
    """E on all examples after each step on a single one."""
    optimizer = optax.sgd(decayed)
    error_of = lambda weights, row: weights_only(weights, jax.tree.map(lambda x: x[row][None], batch))
    update, state = training.make_update(error_of, optimizer), training.init_state(start, optimizer)
    return training.trajectory(update, state, rows, observe=lambda state, _: weights_only(state.params, batch))[1]


def _order(key: Array, num_examples: int, copies: int, num_steps: int) -> Array:
    """The examples of reshuffled epochs over so many copies of the data, as indices of the first copy."""
    n = num_examples * copies
    epochs = jnp.arange(-(-num_steps // n))
    order = jax.vmap(lambda epoch: data.reshuffled(key, epoch, n))(epochs)
    return order.reshape(-1)[:num_steps] % num_examples


def _floor(batch: Batch) -> Array:
    """E*, at the minimum."""
    return weights_only(minimum_of_weights(batch), batch)


def _first_below(curves: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Steps to each level at the best rate for it, (draws, levels)."""
    reached = curves[:, None] <= levels[:, :, None, None]
    return np.where(reached.any(axis=-1), reached.argmax(axis=-1), np.inf).min(axis=-1)


def _held(curves: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Steps from which on the mean over the last `WINDOW` stays below each level, (draws, levels); inf if never."""
    summed = np.cumsum(np.pad(curves, ((0, 0), (1, 0))), axis=1)
    means = (summed[:, WINDOW:] - summed[:, :-WINDOW]) / WINDOW
    exceeds = means[:, None] > levels[:, :, None]
    # Windows up to the last one that exceeds the level.
    before = np.where(exceeds.any(axis=-1), means.shape[1] - exceeds[..., ::-1].argmax(axis=-1), 0)
    return np.where(before < means.shape[1], before + WINDOW, np.inf)


def _identities(batch: Batch, key: Array) -> list[Claim]:
    """What copies change of a run: nothing, in the data's own order, and nothing of the full batch's gradient."""
    start, copies = jnp.array(STARTS[GENERAL]), data.repeated(batch, 10)

    def end(examples: Batch, num_epochs: int) -> Array:
        result = training.fit(
            weights_only, start, examples, optax.sgd, learning_rate=0.2, batch_size=1, num_epochs=num_epochs, key=key,
            order=data.cyclic,
        )  # fmt: skip
        return result.state.params

    gradient = jax.grad(weights_only)
    one, ten = gradient(start, batch), gradient(start, copies)
    return [
        close(
            "cyclic_epoch_of_copies",
            "an epoch over 10 copies less 10 epochs over one, in cyclic order",
            0,
            jnp.abs(end(copies, 1) - end(batch, 10)).max(),
            0,
        ),
        close(
            "batch_gradient_of_copies",
            "batch gradient of 10 copies less that of one, relative",
            0,
            jnp.abs(ten - one).max() / jnp.abs(one).max(),
            1e-14,
        ),
    ]


def _rows(ten: dict[str, np.ndarray]) -> list[tuple[str, float, str]]:
    return [
        (
            f"10 copies, {name}: to {1 + tolerance:g} E*",
            float(np.median(of)),
            f"median; {of.min():.1f} to {of.max():.1f}",
        )
        for name, ratio in ten.items()
        for tolerance, of in zip(TOLERANCES, ratio.T, strict=True)
    ]


def _power(medians: dict[str, np.ndarray], copies: tuple[int, ...], tolerance: float) -> float:
    """Of the copies, by which the ratio grows from a general start."""
    return np.polyfit(np.log(copies), np.log(medians[GENERAL][:, TOLERANCES.index(tolerance)]), 1)[0]


def _power_rows(medians: dict[str, np.ndarray], copies: tuple[int, ...]) -> list[tuple[str, float, str]]:
    remark = "near the minimum below 1: reshuffled epochs over few examples bounce less"
    name = f"{GENERAL}: the ratio grows as this power of the copies, to "
    return [(f"{name}{1 + tolerance:g} E*", _power(medians, copies, tolerance), remark) for tolerance in TOLERANCES]


def _ratio_claims(medians: dict[str, np.ndarray], copies: tuple[int, ...]) -> list[Claim]:
    at = lambda name, times, tolerance: medians[name][copies.index(times), TOLERANCES.index(tolerance)]
    grows = f"{GENERAL}: the ratio grows as this power of the copies, to"
    return [
        close("power_of_copies_to_1_25", f"{grows} 1.25 E*", 1, _power(medians, copies, 0.25), 0.1),
        close("power_of_copies_to_1_05", f"{grows} 1.05 E*", 1, _power(medians, copies, 0.05), 0.1),
        above(
            "ten_copies_to_1_25",
            f"10 copies, {GENERAL}, to 1.25 E*: at least 10 times slower",
            10,
            at(GENERAL, 10, 0.25),
        ),
        above(
            "ten_copies_to_1_05",
            f"10 copies, {GENERAL}, to 1.05 E*: at least 10 times slower",
            10,
            at(GENERAL, 10, 0.05),
        ),
        below(
            "ten_copies_from_zero_to_1_05",
            f"10 copies, {ZERO}, to 1.05 E*: it is less than 10 times slower",
            10,
            at(ZERO, 10, 0.05),
        ),
        below("one_copy_from_zero_to_1_01", f"one copy, {ZERO}, to 1.01 E*: it is faster", 1, at(ZERO, 1, 0.01)),
    ]


def _tolerance_panel(ratios: dict[str, np.ndarray]) -> Panel:
    series = []
    for colour, (name, ratio) in enumerate(ratios.items()):
        middle = np.median(ratio, axis=0)
        series.append(Series(f"{name}: median of {len(ratio)} draws", TOLERANCES, middle, "line-points", colour))
        for label, end in (("  least and most", ratio.min(axis=0)), ("", ratio.max(axis=0))):
            series.append(Series(label, TOLERANCES, end, "dashed", colour))
    return Panel(
        name="ratio_against_tolerance",
        title="10 copies: how much slower the full batch is depends on the tolerance, and on the start",
        xlabel="tolerance ε: until E ≤ (1 + ε) E*",
        ylabel="gradients, full batch / stochastic",
        series=series,
        lines=[Line("the lectures' factor, 10", 10.0, "y")],
        xscale="log",
        yscale="log",
    )


def _copies_panel(medians: dict[str, np.ndarray], copies: tuple[int, ...]) -> Panel:
    shown = [(GENERAL, 0.25), (GENERAL, 0.01), (ZERO, 0.05), (ZERO, 0.01)]
    series = []
    for colour, (name, tolerance) in enumerate(shown):
        ratio = medians[name][:, TOLERANCES.index(tolerance)]
        series.append(Series(f"{name}, to {1 + tolerance} E*", copies, ratio, "points", colour))
        label = "" if colour else "in proportion to the copies"
        series.append(Series(label, copies, ratio[0] * np.array(copies), "dashed", colour))
    return Panel(
        name="ratio_against_copies",
        title="The full batch pays for every copy, single examples only near the minimum",
        xlabel="copies of the 100 examples",
        ylabel="gradients, full batch / stochastic, median",
        series=series,
        lines=[Line("equally fast", 1.0, "y")],
        xscale="log",
        yscale="log",
    )


def _example_panel(whole: np.ndarray, single: np.ndarray, floor: float, num_examples: int) -> Panel:
    best = np.argmin(whole[:, 10])
    shown = np.unique(np.geomspace(1, len(single), 400).astype(int)) - 1
    steps = np.arange(1, 31)
    return Panel(
        name="loss_against_gradients",
        title="One draw, 10 copies: single examples settle while the full batch does its first steps",
        xlabel="gradients of examples",
        ylabel="(E − E*)/E*",
        series=[
            Series(
                f"full batch, η = {BATCH_RATES[best]:.2g}",
                steps * num_examples,
                whole[best][steps] / floor - 1,
                "line-points",
            ),
            Series("single examples, η = 0.2/(1 + 0.008 t)", shown + 1, single[shown] / floor - 1),
        ],
        lines=[Line("1.25 E*", 0.25, "y"), Line("1.01 E*", 0.01, "y")],
        xscale="log",
        yscale="log",
    )
