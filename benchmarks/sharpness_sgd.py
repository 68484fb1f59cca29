"""`sharpness_sgd`, untuned, against the best constant rate of 40-point sweeps, with its momentum and without: an MLP,
full batch.

The last rows take the safeguard away, the check at once where the gradient has doubled.

The sweep's best rate after 300 gradients sets the loss to reach. What `sharpness_sgd` spends on it is counted in
gradients, its Hessian products at the price measured here, and given as a share of 300.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import Row, side_by_side
from jaxnet import curvature, data, losses, nn, training
from jaxnet.lab.record import Panel, Series
from jaxnet.learning_rate import _adaptive, sharpness_sgd

SEEDS = range(5)
STEPS, MOST = 300, 900
FRACTIONS = (0.5, 1.0, 1.5, 1.9)
DEFAULT = 1.9
MODEL = nn.mlp([128, 128, 10], activation=jnp.tanh)
PROBLEMS = {
    "digits, cross-entropy": (data.digits, losses.softmax_cross_entropy),
    "digits, squared error": (data.digits, losses.squared_error),
    "mnist1d, cross-entropy": (data.mnist1d, losses.softmax_cross_entropy),
    "mnist1d, squared error": (data.mnist1d, losses.squared_error),
}
MOMENTUM = 0.9
# With momentum the steps of a rate are 1/(1 − β) as long in the end: the same range of those.
CONSTANT = ((optax.sgd, 1.0), (functools.partial(optax.sgd, momentum=MOMENTUM), 1 - MOMENTUM))
CURVES, POINTS = {}, 150


def run():
    rows = []
    for name in PROBLEMS:
        loss, start, batch = posed(name)
        price = product_price(loss, start(0), batch)
        ratios, plain, diverged = {fraction: [] for fraction in FRACTIONS}, [], 0
        for seed in SEEDS:
            params = start(seed)
            of_plain, best = (best_constant(loss, params, batch, make, scale) for make, scale in CONSTANT)
            for fraction in FRACTIONS:
                values, products = map(np.asarray, follow(loss, params, batch, fraction, jax.random.key(seed)))
                diverged += left(values)
                cost = np.arange(MOST) + price * products
                ratios[fraction].append(cost_to(best[-1], cost, values))
                if fraction == DEFAULT:
                    plain.append(cost_to(of_plain[-1], cost, values))
                if seed == 0:
                    CURVES.setdefault(name, {"momentum at its best constant rate": (np.arange(len(best)), best)})
                    CURVES[name][f"fraction {fraction}"] = (cost, values)
        of_default = ratios[DEFAULT]
        rows.append(
            Row(
                f"{name}: cost to momentum's loss / {STEPS} gradients, median",
                statistics.median(of_default),
                2,
                False,
                {},
            )
        )
        rows.append(Row(f"{name}: the same, worst of {len(SEEDS)} seeds", max(of_default), 2, False, {}))
        rows.append(Row(f"{name}: cost to gradient descent's loss, median", statistics.median(plain), 2, False, {}))
        rows.append(Row(f"{name}: runs that diverged, of {len(SEEDS) * len(FRACTIONS)}", diverged, 0, False, {}))
        rows += [
            Row(f"{name}: median at fraction {fraction}", statistics.median(ratios[fraction]), np.inf, False, {})
            for fraction in FRACTIONS[:-1]
        ]
        rows.append(Row(f"{name}: a sweep's own cost / {STEPS} gradients", 40, np.inf, False, {}))
        rows.append(Row(f"{name}: price of a Hessian product in gradients", price, 2, False, {}))
    return rows + [without_safeguard(name) for name in PROBLEMS]


def posed(name):
    """The loss, a function from a seed to where it starts, and the batch."""
    load, criterion = PROBLEMS[name]
    inputs, labels = load()
    targets = labels if criterion is losses.softmax_cross_entropy else jax.nn.one_hot(labels, 10)
    start = lambda seed: MODEL.init(jax.random.key(seed), inputs.shape[1:])
    return losses.mean_loss(MODEL.apply, criterion), start, (inputs, targets)


def left(values):
    """Whether a run ends in numbers that are not finite, or goes to twice its initial loss."""
    return int(not np.isfinite(values).all() or values.max() > 2 * values[0])


def without_safeguard(name):
    """How many of the default's runs leave if they are checked at their turn only."""
    loss, start, batch = posed(name)
    kept, number = _adaptive._JUMP, 0
    _adaptive._JUMP = np.inf
    jax.clear_caches()
    for seed in SEEDS:
        number += left(np.asarray(follow(loss, start(seed), batch, DEFAULT, jax.random.key(seed))[0]))
    _adaptive._JUMP = kept
    jax.clear_caches()
    return Row(f"{name}: runs that leave without the check at once, of {len(SEEDS)}", number, np.inf, False, {})


def product_price(loss, params, batch):
    gradient = jax.jit(jax.grad(loss))
    product = jax.jit(lambda p, b, v: curvature.hessian(loss, p, b)(v))
    times = side_by_side(
        {"gradient": lambda: gradient(params, batch), "product": lambda: product(params, batch, params)}, repeats=31
    )
    return times["product"] / times["gradient"]


def best_constant(loss, params, batch, make, scale):
    """The losses along the run of the rate that ends lowest after 300 gradients, of 40 from .02/λ to 40/λ, scaled."""
    value = curvature.sharpness(loss, params, batch, key=jax.random.key(0)).value
    results = training.sweep(
        loss, params, batch, make, learning_rates=scale * np.geomspace(0.02, 40, 40) / float(value), batch_size=None,
        num_epochs=STEPS + 1, key=jax.random.key(0),
    )  # fmt: skip
    runs = [r.history.step_loss[:, 0] for r in results if len(r.history.step_loss) > STEPS]
    return min((run for run in runs if np.isfinite(run).all()), key=lambda run: run[-1])


def cost_to(target, cost, values):
    """The gradients spent until the loss is down to a target, over those of the sweep's run."""
    reached = values <= target
    return cost[np.argmax(reached)] / STEPS if reached.any() else np.inf


@functools.partial(jax.jit, static_argnames=("loss", "fraction"))
def follow(loss, params, batch, fraction, key):
    """The loss before each step, and the products spent by then."""
    optimizer = sharpness_sgd(key=key, fraction=fraction)
    update, state = training.make_update(loss, optimizer), training.init_state(params, optimizer)
    spent = lambda state, metrics: (metrics["loss"], state.opt_state[0].num_matvecs)
    values, products = training.trajectory(update, state, batch, num_steps=MOST, observe=spent)[1]
    return values, jnp.append(0, products[:-1])


def panels():
    return [
        Panel(
            name=name.replace(", ", "-").replace(" ", "-"),
            title=f"{name}: untuned, against the best of 40 constant rates",
            xlabel="gradients of the full batch, products at their price",
            ylabel="least loss so far",
            series=[curve(label, i, *xy) for i, (label, xy) in enumerate(curves.items())],
            yscale="log",
        )
        for name, curves in CURVES.items()
    ]  # fmt: skip


def curve(label, number, x, y):
    """The least loss so far, at some of the steps: what a figure shows is all that the file keeps."""
    style = ("dashed", 6) if "best" in label else ("line", number)
    every, shown = -(-len(x) // POINTS), np.asarray(x) <= 2 * MOST
    some = lambda values: [float(f"{value:.4g}") for value in np.asarray(values)[shown][::every]]
    return Series(label, some(x), some(np.minimum.accumulate(y)), *style)
