"""What a larger batch buys: a larger rate and fewer steps, up to the critical batch size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import data, learning_rate, losses, nn, training
from jaxnet.contract import Array
from jaxnet.lab._progress import Share, unseen, watched
from jaxnet.lab.experiments import _whole_runs
from jaxnet.lab.experiments.two_gaussians import WITH_BIAS, minimum_with_bias
from jaxnet.lab.record import Claim, Line, Panel, Record, Series, close, within
from jaxnet.learning_rate import NoisyCurvature

QUESTION = "How do the best rate and the number of steps depend on the batch size?"

# Rates tried around a prediction, in units of it.
AROUND = 2.0 ** np.linspace(-2.5, 2.5, 21)
# And from nothing known, for whole runs.
RATES = 2.0 ** np.arange(-5, 3.6, 0.5)

MODEL = nn.mlp([32, 10], activation=jnp.tanh)
LOSS = losses.mean_loss(MODEL.apply, losses.softmax_cross_entropy)


def run(
    *,
    seed: int = 0,
    batch_sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512),
    num_epochs: tuple[int, ...] = (0, 1, 4, 15),
    target: float = 0.25,
    num_runs: int = 3,
    whole_sizes: tuple[int, ...] = (4, 16, 64, 256),
    whole_epochs: int = 20,
    share: Share = unseen,
) -> Record:
    """The best rate for one step and for whole runs, the steps to a loss, and batches whose examples are alike."""
    keys = jax.random.split(jax.random.key(seed), 5)
    params, batch = MODEL.init(keys[0], (64,)), data.digits()
    best = {}
    for epochs in watched(num_epochs, share, 0.0, 0.3):
        point = _trained(params, batch, epochs, keys[1])
        best[epochs] = _best_rates(point, batch, batch_sizes, keys[2])
    share(0.3)
    critical, steps = _steps_to(target, params, batch, batch_sizes, num_runs, keys[3])
    alike, alike_claims = _alike(seed)
    whole = _whole_runs.whole_runs(
        LOSS, params, batch, whole_sizes, whole_epochs, keys[4], lambda done: share(0.4 + 0.6 * done)
    )
    claims = [
        *(_rate_claim(epochs, batch_sizes, found) for epochs, found in best.items() if epochs),
        _within_factor("critical_batch_size", "critical batch size", critical["predicted"], critical["measured"], 3),
        *alike_claims,
        *_whole_runs.claims(whole_sizes, whole),
    ]
    rows = [
        (f"best rate / predicted, {_when(epochs)}", _worst(found), "the worst of all batch sizes; " + _remark(epochs))
        for epochs, found in best.items()
    ]
    return Record(
        name="batch_size",
        question=QUESTION,
        config={
            "batch_sizes": batch_sizes, "num_epochs": num_epochs, "target": target, "num_runs": num_runs,
            "whole_sizes": whole_sizes, "whole_epochs": whole_epochs,
        },
        seed=seed,
        dtype="float32",
        measurements={
            "best_rates": best, "critical_batch_size": critical, "steps": steps, "alike": alike, "whole_runs": whole,
        },
        claims=claims,
        rows=rows,
        panels=[
            _rates_panel(batch_sizes, best),
            _whole_runs.panel(whole_sizes, whole),
            *_steps_panels(batch_sizes, steps, critical, target),
        ],
    )  # fmt: skip


def _when(epochs: int) -> str:
    return f"after {epochs} epoch{'s' * (epochs > 1)}" if epochs else "at the start"


def _trained(params: Any, batch: Any, num_epochs: int, key: Array) -> Any:
    if not num_epochs:
        return params
    result = training.fit(
        LOSS, params, batch, optax.sgd, learning_rate=0.3, batch_size=32, num_epochs=num_epochs, key=key
    )
    return result.state.params


def _best_rates(params: Any, batch: Any, batch_sizes: tuple[int, ...], key: Array) -> dict[str, np.ndarray]:
    """ε_max/(1 + B_noise/B), and the rate at which a step really lowers the loss most, on average over batches."""
    noise_key, draw_key = jax.random.split(key)
    found = learning_rate.noisy_curvature(LOSS, params, batch, key=noise_key, num_probes=64)
    sizes = np.array(batch_sizes)
    predicted = np.asarray(learning_rate.for_batch_size(found.greedy, found.noise_scale, jnp.asarray(sizes)))
    measured = []
    for size, rate in zip(batch_sizes, predicted, strict=True):
        after = _after_a_step(params, batch, jnp.asarray(rate * AROUND), draw_key, size, max(64, 1024 // size))
        measured.append(rate * AROUND[0] * (AROUND[1] / AROUND[0]) ** _lowest(np.asarray(after)))
    return {"predicted": predicted, "measured": np.array(measured), "noise_scale": np.asarray(found.noise_scale)}


@functools.partial(jax.jit, static_argnames=("size", "draws"))
def _after_a_step(params: Any, batch: Any, rates: Array, key: Array, size: int, draws: int) -> Array:
    """The loss on all examples after a step at each rate, its mean over batches drawn independently."""
    n, slope = len(batch[1]), jax.grad(LOSS)(params, batch)

    def of_batch(rows: Array) -> Array:
        gradient = jax.grad(LOSS)(params, jax.tree.map(lambda x: x[rows], batch))
        step = lambda rate: LOSS(jax.tree.map(lambda p, g: p - rate * g, params, gradient), batch)
        # To first order a step gains η g·g_B, which is η|g|² on average: what chance adds to that is taken out.
        by_chance = optax.tree.vdot(slope, optax.tree.sub(gradient, slope))
        return jax.vmap(step)(rates) + rates * by_chance

    return jax.lax.map(of_batch, jax.random.randint(key, (draws, size), 0, n)).mean(axis=0)


def _lowest(values: np.ndarray) -> float:
    """Where on the grid the parabola through the lowest value and its neighbours is lowest."""
    i = int(np.clip(np.argmin(values), 1, len(values) - 2))
    left, middle, right = values[i - 1 : i + 2]
    return i + float(np.clip((left - right) / (2 * (left - 2 * middle + right)), -1, 1))


def _within_factor(key: str, name: str, predicted: Any, measured: Any, factor: float) -> Claim:
    p, m = float(predicted), float(measured)
    return Claim(key, name, p, m, p / factor <= m <= p * factor, f"within a factor of {factor:g}")


def _worst(found: dict[str, np.ndarray]) -> float:
    """The ratio of measured to predicted that is farthest from 1."""
    ratios = found["measured"] / found["predicted"]
    return float(ratios[np.argmax(np.abs(np.log(ratios)))])


def _rate_claim(epochs: int, batch_sizes: tuple[int, ...], found: dict[str, np.ndarray]) -> Claim:
    name = f"best rate / (ε_max/(1 + B_noise/B)) {_when(epochs)}, worst of B = {batch_sizes[0]} … {batch_sizes[-1]}"
    return _within_factor(f"best_rate_after_{epochs}_epochs", name, 1, _worst(found), 1.5)


def _remark(epochs: int) -> str:
    return "claimed to be within 1.5" if epochs else "no claim: over so long a step the loss is not quadratic"


def _steps_to(
    target: float, params: Any, batch: Any, batch_sizes: tuple[int, ...], num_runs: int, key: Array
) -> tuple[dict[str, float], np.ndarray]:
    """B_crit = E_min/S_min, predicted from B_noise and measured; and the steps to the target at each B's best rate."""
    predicted = float(np.nanmean(_noise_along(params, batch, target, key)))
    keys = jax.random.split(key, num_runs)
    steps = []
    for size in batch_sizes:
        # Beyond the critical size more steps than the fewest are of no use; far below it they fall as 1/B.
        most = 100 + 4000 // size
        needed = np.asarray(_first_steps(params, batch, jnp.asarray(RATES), keys, target, size, most))
        steps.append(np.where(needed < most, needed, np.inf).mean(axis=1).min())
    sizes, fewest = np.array(batch_sizes), np.array(steps)
    # S = S_min (1 + B_crit/B), fitted with equal weight on every size.
    slope, intercept = np.polyfit(1 / sizes, fewest, 1, w=1 / fewest)
    return {"predicted": predicted, "measured": float(slope / intercept), "fewest_steps": float(intercept)}, fewest


def _noise_along(params: Any, batch: Any, target: float, key: Array) -> list[float]:
    """B_noise at each step of full-batch descent with the best rate for that step, down to the target."""

    @jax.jit
    def look(params: Any, key: Array) -> tuple[NoisyCurvature, Any, Array]:
        found = learning_rate.noisy_curvature(LOSS, params, batch, key=key)
        gradient = jax.grad(LOSS)(params, batch)
        after = jax.tree.map(lambda p, g: p - found.greedy * g, params, gradient)
        return found, after, LOSS(params, batch)

    scales: list[float] = []
    for step in range(200):  # On the host, which looks at each step whether the target is reached.
        found, after, value = look(params, jax.random.fold_in(key, step))
        if value <= target:
            break
        scales.append(float(found.noise_scale))
        params = after
    return scales


@functools.partial(jax.jit, static_argnames=("size", "most"))
def _first_steps(params: Any, batch: Any, rates: Array, keys: Array, target: float, size: int, most: int) -> Array:
    """(rates, runs): after how many steps the loss on all examples was down to the target, or at least ``most``."""
    every = max(1, 64 // size)

    def one_run(rate: Array, key: Array) -> Array:
        def error_of(params: Any, i: Array) -> Array:
            rows = jax.random.randint(jax.random.fold_in(key, i), (size,), 0, len(batch[1]))
            return LOSS(params, jax.tree.map(lambda x: x[rows], batch))

        def some(carry: Any) -> Any:
            state, _ = training.trajectory(update, carry[0], carry[0].step + jnp.arange(every))
            return state, LOSS(state.params, batch)

        optimizer = optax.sgd(rate)
        update, start = training.make_update(error_of, optimizer), training.init_state(params, optimizer)
        goes_on = lambda carry: (carry[0].step < most) & (carry[1] > target)
        state, value = jax.lax.while_loop(goes_on, some, (start, LOSS(params, batch)))
        return jnp.where(value <= target, state.step, most)

    return jax.vmap(lambda rate: jax.lax.map(lambda key: one_run(rate, key), keys))(rates)


def _alike(seed: int, rate: float = 0.2, size: int = 10, num_runs: int = 400) -> tuple[dict[str, Any], list[Claim]]:
    """A neuron on the two Gaussians: the excess loss kept by batches of ten examples, and of one example ten times."""
    with jax.enable_x64(True):
        batch = data.two_gaussians_exact()
        minimum = minimum_with_bias(batch)
        floor = WITH_BIAS(minimum, batch)
        keys = jax.random.split(jax.random.key(seed), num_runs)
        found, claims = {}, []
        for name, distinct, copies in (("distinct", size, 1), ("copies", 1, size), ("one", 1, 1)):
            excess = np.asarray(_excess(minimum, batch, rate, keys, distinct, copies)) / float(floor)
            predicted = learning_rate.stationary_excess(WITH_BIAS, minimum, batch, distinct, rate, replace=True)
            found[name] = {"mean": excess.mean(), "error": excess.std(ddof=1) / num_runs**0.5}
            words = {"distinct": f"{size} examples", "copies": f"one example {size} times", "one": "one example"}[name]
            claims.append(
                within(
                    f"excess_of_{name}",
                    f"excess E/E* − 1 at η = {rate}, batches of {words}",
                    predicted / floor,
                    excess.mean(),
                    0.05,
                )
            )
        difference = abs(found["copies"]["mean"] - found["one"]["mean"])
        claims.append(
            close("copies_add_nothing", "copies add nothing: their excess less that of one", 0.0, difference, 1e-12)
        )
    return found, claims


@functools.partial(jax.jit, static_argnames=("distinct", "copies"))
def _excess(minimum: Any, batch: Any, rate: float, keys: Array, distinct: int, copies: int) -> Array:
    """E − E* averaged over 1000 steps from the 100th on, each of ``distinct`` examples ``copies`` times."""
    floor = WITH_BIAS(minimum, batch)

    def one_run(key: Array) -> Array:
        def step(params: Any, key: Array) -> tuple[Any, Array]:
            rows = jnp.tile(jax.random.randint(key, (distinct,), 0, len(batch[1])), copies)
            gradient = jax.grad(WITH_BIAS)(params, jax.tree.map(lambda x: x[rows], batch))
            return jax.tree.map(lambda p, g: p - rate * g, params, gradient), WITH_BIAS(params, batch) - floor

        return training.trajectory(step, minimum, jax.random.split(key, 1100))[1][100:].mean()

    return jax.lax.map(one_run, keys, batch_size=100)


def _rates_panel(batch_sizes: tuple[int, ...], best: dict[int, dict[str, np.ndarray]]) -> Panel:
    series = []
    for colour, (epochs, found) in enumerate(best.items()):
        series += [
            Series(f"measured, {_when(epochs)}", batch_sizes, found["measured"], "points", colour),
            Series("  ε_max/(1 + B_noise/B)", batch_sizes, found["predicted"], "line", colour),
        ]
    return Panel(
        name="best_rate",
        title="The rate at which one step lowers the loss most, on digits",
        xlabel="batch size B",
        ylabel="learning rate η",
        series=series,
        xscale="log2",
        yscale="log",
    )


def _steps_panels(
    batch_sizes: tuple[int, ...], steps: np.ndarray, critical: dict[str, float], target: float
) -> list[Panel]:
    sizes = np.array(batch_sizes)
    fitted = critical["fewest_steps"] * (1 + critical["measured"] / sizes)
    lines = [
        Line("B_crit, fitted", critical["measured"], colour=1),
        Line("B_crit, predicted", critical["predicted"], colour=2),
    ]
    common: dict[str, Any] = {"xlabel": "batch size B", "lines": lines, "xscale": "log2", "yscale": "log"}
    return [
        Panel(
            name="steps",
            title=f"Steps to a loss of {target:g}, each batch size at its best rate",
            ylabel="steps",
            series=[
                Series("measured", sizes, steps, "points", 0),
                Series("S_min (1 + B_crit/B), fitted", sizes, fitted, "line", 1),
            ],
            **common,
        ),
        Panel(
            name="examples",
            title=f"Example gradients to a loss of {target:g}: small batches cost nothing, large ones do",
            ylabel="examples",
            series=[Series("measured", sizes, sizes * steps, "line-points", 0)],
            **common,
        ),
    ]
