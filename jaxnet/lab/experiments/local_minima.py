"""A neuron with two minima, and which updates leave the poor one."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import losses, training
from jaxnet.contract import Array
from jaxnet.lab.record import Claim, Panel, Record, Series, close, slug, within

QUESTION = "Does a stochastic run leave a poor minimum in which the full batch stays?"

RATES = (0.005, 0.0065, 0.0085, 0.011, 0.0145, 0.02)
# At these, neither all of the runs leave within the steps nor none.
CLAIMED = RATES[:4]
SPREAD = 0.05
QUANTILE = 3.29
"""Of the normal distribution: Wilson's interval of 99.9 %."""
# Where the chain is solved; runs that leave it to either side are on their way back, or away.
GRID = np.linspace(-0.8, 0.8, 801)
Batch = tuple[Array, Array]


def error(weight: Array, batch: Batch) -> Array:
    """E(ω) = ½ mean (tanh(ωx) − t)²."""
    return jnp.mean(losses.squared_error(jnp.tanh(weight * batch[0]), batch[1]))


def examples(key: Array, num_examples: int) -> Batch:
    """Four fifths obey t = tanh(2x) at x ~ N(1, .2²); the others are far, x ~ N(5, .5²), with t = tanh(−x/4).

    The far ones hold a narrow minimum near 0. At ω = 2 they saturate the neuron, and pull no more.
    """
    near = jnp.arange(num_examples) < num_examples * 4 // 5
    noise = jax.random.normal(key, (num_examples,))
    inputs = jnp.where(near, 1 + 0.2 * noise, 5 + 0.5 * noise)
    return inputs, jnp.tanh(jnp.where(near, 2.0, -0.25) * inputs)


def run(
    *,
    seed: int = 0,
    num_examples: int = 100,
    num_seeds: int = 100,
    num_steps: int = 2000,
    num_timed: int = 1000,
    num_timed_steps: int = 10_000,
) -> Record:
    """100 stochastic runs and 100 of the full batch about the poor minimum of a neuron, at the same six rates.

    Of one weight, a stochastic run is a Markov chain on the line. Its chance u to end beyond the barrier obeys
    u_{T+1}(ω) = mean over n of u_T(ω − η E_n′(ω)), and is solved on a grid. The time to leave grows as exp(A/η)/η with
    A = 2∫ E′/Var(E_n′) dω from the minimum to the barrier, where noise is small.

    Reference:
      Kramers, "Brownian Motion in a Field of Force and the Diffusion Model of Chemical Reactions", Physica 1940, for
      noise that depends on ω. A neuron's many minima: Auer, Herbster & Warmuth, "Exponentially Many Local Minima for
      Single Neurons", NIPS 1995.
    """
    with jax.enable_x64(True):
        return _run(seed, num_examples, num_seeds, num_steps, num_timed, num_timed_steps)


def _run(seed: int, num_examples: int, num_seeds: int, num_steps: int, num_timed: int, num_timed_steps: int) -> Record:
    draw_key, start_key, key, time_key = jax.random.split(jax.random.key(seed), 4)
    batch = examples(draw_key, num_examples)
    land = landscape(batch)
    apart = jax.random.uniform(start_key, (num_seeds,), minval=-SPREAD, maxval=SPREAD)
    rates, keys = jnp.array(RATES), jax.random.split(key, num_seeds)
    ends, _, _ = stochastic(batch, land.poor + apart, rates, land.barrier, keys, num_steps)
    from_good, _, _ = stochastic(batch, land.good + apart, rates, land.barrier, keys, num_steps)
    # The last rate is the full batch's own, 1/λ at the poor minimum.
    whole = full_batch(batch, land.poor + apart, jnp.append(rates, 1 / land.curvature), num_steps)
    counts = Counts(
        num_seeds,
        left=np.asarray(ends > land.barrier).sum(axis=1),
        predicted=np.array([chance(batch, land.poor + apart, rate, land.barrier, num_steps) for rate in RATES]),
        whole_stays=np.asarray(whole <= land.barrier).sum(axis=1),
        good_stays=int(np.sum(from_good > land.barrier)),
    )
    timed = jnp.full(num_timed, land.poor), rates, land.barrier, jax.random.split(time_key, num_timed)
    _, inside, steps = stochastic(batch, *timed, num_timed_steps)
    # Of waiting times that are cut off, the mean is the time waited over the number of those that ended.
    times = np.asarray(steps.sum(axis=1) / jnp.maximum(1, (~inside).sum(axis=1)))
    exponent = kramers(batch, land)
    slope = np.polyfit(1 / np.array(CLAIMED), np.log(times * RATES)[: len(CLAIMED)], 1)[0]
    return Record(
        name="local_minima",
        question=QUESTION,
        config={
            "num_examples": num_examples,
            "num_seeds": num_seeds,
            "num_steps": num_steps,
            "num_timed": num_timed,
            "num_timed_steps": num_timed_steps,
        },
        seed=seed,
        dtype="float64",
        measurements={
            "landscape": land._asdict(),
            "rates": RATES,
            "counts": counts._asdict(),
            "mean_times": times,
            "exponent": exponent,
            "slope": slope,
        },
        claims=[
            *counts.claims(1 / land.curvature, num_steps),
            within(
                "kramers_exponent", "ln(η × mean time to leave) against 1/η: slope, Kramers' A", exponent, slope, 0.2
            ),
        ],
        rows=[*_rows_of_landscape(batch, land), *counts.rows()],
        panels=[
            _landscape_panel(batch, land, np.asarray(ends[3]), np.asarray(whole[3])),
            counts.panel(num_steps),
            _times_panel(times, exponent),
        ],
    )


class Counts(NamedTuple):
    """Of so many runs at each of `RATES`, those that left the poor minimum or stayed there.

    Attributes:
      num_runs: n.
      left: stochastic runs that left.
      predicted: their share by the chain.
      whole_stays: full-batch runs that stayed; one entry more, at 1/λ.
      good_stays: stochastic runs from the good minimum that stayed there, of all rates together.
    """

    num_runs: int
    left: np.ndarray
    predicted: np.ndarray
    whole_stays: np.ndarray
    good_stays: int

    def claims(self, own_rate: float, num_steps: int) -> list[Claim]:
        """All of the full batch's stay; of the stochastic ones Wilson's interval holds the predicted share."""
        n = self.num_runs
        width = QUANTILE * np.sqrt(self.predicted * (1 - self.predicted) / n)
        shares = zip(CLAIMED, self.predicted, self.left / n, width, strict=False)
        rates = {**{slug("stays_at", rate): rate for rate in RATES}, "stays_at_inverse_curvature": own_rate}
        whole = zip(rates.items(), self.whole_stays, strict=True)
        return [
            *(
                close(key, f"full batch, η = {rate:.3g}: runs of {n} that stay", n, count, 0)
                for (key, rate), count in whole
            ),
            *(
                close(
                    slug("leaves_at", rate),
                    f"stochastic, η = {rate}: share of {n} runs that leave in {num_steps} steps",
                    p,
                    share,
                    w,
                )
                for rate, p, share, w in shares
            ),
            close(
                "good_minimum_stays",
                "stochastic, all rates: runs that stay in the good minimum",
                n * len(RATES),
                self.good_stays,
                0,
            ),
        ]

    def rows(self) -> list[tuple[str, float, str]]:
        """The counts, in words."""
        found = zip(RATES, self.left, self.predicted, self.whole_stays, strict=False)
        return [
            (
                f"stochastic, η = {rate}: runs that leave",
                float(count),
                f"of {self.num_runs}; predicted {self.num_runs * p:.1f}; of the full batch {self.num_runs - stays}",
            )
            for rate, count, p, stays in found
        ]

    def panel(self, num_steps: int) -> Panel:
        """The shares against η."""
        share, n, z = self.left / self.num_runs, self.num_runs, QUANTILE
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
        return Panel(
            name="share_against_rate",
            title=f"The larger η, the more stochastic runs leave within {num_steps} steps",
            xlabel="learning rate η",
            ylabel=f"share of {n} runs that leave the poor minimum",
            series=[
                Series("stochastic, predicted by the chain", RATES, self.predicted, "line", 1),
                Series("stochastic, measured", RATES, share, "points", 1),
                Series("  Wilson's interval, 99.9 %", RATES, centre - half, "dashed", 4),
                Series("", RATES, centre + half, "dashed", 4),
                Series("full batch, measured", RATES, 1 - self.whole_stays[:-1] / n, "line-points", 0),
            ],
        )


class Landscape(NamedTuple):
    """The two minima of E, the barrier between them, and E″ at the poor one."""

    poor: float
    barrier: float
    good: float
    curvature: float


def landscape(batch: Batch) -> Landscape:
    """Where E′ changes its sign on [−.8, 3], by bisection between the points of a grid.

    Raises:
      ValueError: there are not two minima with a barrier between them.
    """
    slope = jax.jit(jax.vmap(jax.grad(error), in_axes=(0, None)))
    grid = jnp.linspace(-0.8, 3.0, 381)
    signs = np.sign(np.asarray(slope(grid, batch)))
    cells = np.flatnonzero(signs[:-1] * signs[1:] < 0)
    if len(cells) != 3:
        raise ValueError(
            f"num_examples: expected data with two minima and a barrier, got {len(cells)} stationary points"
        )
    low, high = grid[cells], grid[cells + 1]
    for _ in range(50):
        middle = (low + high) / 2
        same = jnp.sign(slope(middle, batch)) == signs[cells]
        low, high = jnp.where(same, middle, low), jnp.where(same, high, middle)
    poor, barrier, good = map(float, low)
    return Landscape(poor, barrier, good, float(jax.grad(jax.grad(error))(low[0], batch)))


@functools.partial(jax.jit, static_argnames="num_steps")
def stochastic(
    batch: Batch, starts: Array, rates: Array, barrier: Array | float, keys: Array, num_steps: int
) -> tuple[Array, Array, Array]:
    """Runs on single examples, drawn with replacement, for each rate and start.

    Returns:
      Their last weights, whether they never crossed the barrier, and the steps until they did, all (rates, starts).
    """

    def one(rate: Array, start: Array, key: Array) -> tuple[Array, Array, Array]:
        optimizer = optax.sgd(rate)
        update = training.make_update(error, optimizer)

        def step(carry: tuple, row: Array) -> tuple[tuple, None]:
            state, inside, steps = carry
            state, _ = update(state, jax.tree.map(lambda x: x[row][None], batch))
            return (state, inside & (state.params <= barrier), steps + inside), None

        rows = jax.random.randint(key, (num_steps,), 0, len(batch[0]))
        carry = training.init_state(start, optimizer), jnp.array(True), jnp.zeros((), jnp.int32)
        (state, inside, steps), _ = training.trajectory(step, carry, rows)
        return state.params, inside, steps

    over_starts = jax.vmap(one, in_axes=(None, 0, 0))
    return jax.vmap(over_starts, in_axes=(0, None, None))(rates, starts, keys)


@functools.partial(jax.jit, static_argnames="num_steps")
def full_batch(batch: Batch, starts: Array, rates: Array, num_steps: int) -> Array:
    """The last weights of gradient descent on all examples, (rates, starts)."""

    def one(rate: Array, start: Array) -> Array:
        optimizer = optax.sgd(rate)
        update, state = training.make_update(error, optimizer), training.init_state(start, optimizer)
        return training.trajectory(update, state, batch, num_steps=num_steps)[0].params

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(rates, starts)


def _slopes(weights: Array, batch: Batch) -> Array:
    """E_n′(ω), (weights, N)."""
    one = lambda w, x, t: jax.grad(error)(w, (x[None], t[None]))
    return jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, None, None))(weights, *batch)


@functools.partial(jax.jit, static_argnames="num_steps")
def chance(batch: Batch, starts: Array, rate: Array | float, barrier: Array | float, num_steps: int) -> Array:
    """The share of these starts that ends beyond the barrier, from the chain on `GRID`, linear between its points."""
    grid, n = jnp.asarray(GRID), len(batch[0])
    places = (grid[:, None] - rate * _slopes(grid, batch) - grid[0]) / (grid[1] - grid[0])
    places = jnp.clip(places, 0, grid.size - 1.001)
    low = places.astype(int)
    part, rows = (places - low) / n, jnp.arange(grid.size)[:, None]
    chain = jnp.zeros((grid.size, grid.size)).at[rows, low].add(1 / n - part).at[rows, low + 1].add(part)
    beyond = (grid > barrier).astype(chain.dtype)
    return jnp.interp(starts, grid, jnp.linalg.matrix_power(chain, num_steps) @ beyond).mean()


def kramers(batch: Batch, land: Landscape) -> float:
    """A = 2∫ E′/Var(E_n′) dω from the poor minimum to the barrier."""
    weights = jnp.linspace(land.poor, land.barrier, 201)
    slopes = _slopes(weights, batch)
    return float(2 * jnp.trapezoid(slopes.mean(axis=1) / slopes.var(axis=1), weights))


def _values(weights: np.ndarray, batch: Batch) -> np.ndarray:
    return np.asarray(jax.vmap(lambda w: error(w, batch))(jnp.asarray(weights)))


def _rows_of_landscape(batch: Batch, land: Landscape) -> list[tuple[str, float, str]]:
    names = "the poor minimum", "the barrier", "the good minimum"
    values = _values(np.array(land[:3]), batch)
    return [(f"ω of {name}", w, f"E = {e:.4g}") for name, w, e in zip(names, land[:3], values, strict=True)]


def _landscape_panel(batch: Batch, land: Landscape, single: np.ndarray, whole: np.ndarray) -> Panel:
    weights = np.linspace(-0.4, 2.4, 281)
    left = [int((ends > land.barrier).sum()) for ends in (single, whole)]
    return Panel(
        name="landscape",
        title=f"At η = {RATES[3]}, {left[0]} of {len(single)} stochastic runs leave, and {left[1]} of the full batch",
        xlabel="weight ω",
        ylabel="E",
        series=[
            Series("E(ω)", weights, _values(weights, batch), "line", 6),
            Series("ends of the stochastic runs", single, _values(single, batch), "points", 1),
            Series("ends of the full batch's", whole, _values(whole, batch), "points", 0),
        ],
    )


def _times_panel(times: np.ndarray, exponent: float) -> Panel:
    inverse, scaled = 1 / np.array(RATES), times * RATES
    through = len(CLAIMED) - 1
    line = scaled[through] * np.exp(exponent * (inverse - inverse[through]))
    return Panel(
        name="time_against_rate",
        title=f"The time to leave grows as exp(A/η)/η, with Kramers' exponent A = {exponent:.3g}",
        xlabel="1/η",
        ylabel="η × mean number of steps to beyond the barrier",
        series=[
            Series("measured", inverse, scaled, "points"),
            Series("slope A, through one of the points", inverse, line, "dashed"),
        ],
        yscale="log",
    )
