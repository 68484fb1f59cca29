"""Where training really loses stability, found from gradients alone on a ladder of rates."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, MakeOptimizer
from jaxnet.curvature import Space
from jaxnet.mesh import keep_pace
from jaxnet.training import TrainState, ValueFn, with_extra_args, with_rate

# The oscillation's growth is taken from so many moves: what negative curvature makes of rounding errors stays small.
_STEPS = 12
_FILTER_STEPS = 100
# Updates among which one has to move the params, as `optax.MultiSteps` does after a few.
_PATIENCE = 100
# By what share of themselves moves may miss a sum of others, and iterates (so many at least) their recursion; networks
# in float32 stay below .15.
_AMISS, _FEWEST = 0.2, 6


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeasuredStability:
    """An optimizer at each of R rates, twice: about a fixed point, and plainly.

    Attributes:
      rates: (R,) ascending η.
      growth: (D, R) factor a step by which the oscillation about the fixed point grows, for D random starts; NaN
        where the iterates do not oscillate, or follow no recursion.
      limits: (D,) the rate at which the growth passes 1, by a root of −1; NaN where the ladder does not hold it.
      plain_loss: (R, T + 1) the loss along plain training, from step 0 on.
      plain_bracket: (2,) the largest rate up to which every run ended below its initial loss, and the next on
        the ladder, the first that failed; NaN for an end that the ladder does not hold.
    """

    rates: Array
    growth: Array
    limits: Array
    plain_loss: Array
    plain_bracket: Array

    @property
    def limit(self) -> Array:
        """The measured limit of stability, the mean over the random starts."""
        return self.limits.mean()

    @property
    def limit_error(self) -> Array:
        """The spread of ``limits`` over the random starts, one standard deviation."""
        return self.limits.std(ddof=1) if self.limits.size > 1 else jnp.full((), jnp.nan)


@contract.takes_loss
@dataset.on_automatic_axes
def measure_stability(
    loss: Loss,
    params: ArrayTree,
    batch: ArrayTree,
    make_optimizer: MakeOptimizer,
    *,
    rates: ArrayLike,
    key: Array,
    opt_state: Any = None,
    num_starts: int = 3,
    num_steps: int = 60,
) -> MeasuredStability:
    """Measure the limit of stability at ``params``, and where plain training fails, without any Hessian product.

    On the tilted loss E(ω) − ⟨g(ω₀), ω⟩ the point ω₀ is a fixed point of gradient descent. Started beside it, the
    part of the iterates that alternates in sign from step to step grows beyond η = 2/λ_max and dies below. Momentum's
    iterates too have components s_t along the start that obey s_{t+1} = a s_t + b s_{t−1}: the growth is the size of
    the larger root of z² = az + b, with a and b fitted to what is seen.
    The start is a random vector after 100 steps of gradient *ascent* on the tilted loss, which multiply a direction of
    curvature λ by 1 + λ/λ_max each: that leaves the sharp directions. (Negative curvature leaves ω₀ at any
    rate, without alternating; from an unfiltered start it would drown the rest.) Beside it runs plain training on E
    itself at the same rates: what it survives is not the local limit, since training moves to flatter places.

    An optimizer that moves once in k updates (`optax.MultiSteps`) counts by its moves. One that reads the loss is shown
    the tilted one; a rate that it changes by itself, as `optax.contrib.reduce_on_plateau` does, is measured as it
    stands before, of which 6 iterates are needed.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: ω₀.
      batch: the examples, all of them at each step.
      make_optimizer: the maker, such as `optax.sgd`, called with each rate. Its moves are to be linear in a small
        gradient and in the rate: weight decay belongs into the loss, or ω₀ is no fixed point; a fresh `optax.adam`
        steps by signs, and needs an ``opt_state``.
      rates: (R,) ascending; their geometric middle should be near the limit expected.
      key: a `jax.random.key` for the random starts.
      opt_state: the state to start in, such as Adam's second moments, its momentum zero; by default a fresh one.
      num_starts: D, how many starts; their spread is the error of the limit.
      num_steps: T, the steps of plain training.

    Returns:
      A `MeasuredStability`.

    Raises:
      TypeError: the params are in half precision; or the optimizer's moves are not linear in a small gradient and in
        the rate, or there are none.
      ValueError: the rates are not ascending, positive and finite, or fewer than 3; or the state is another one's.

    Reference:
      The tilt: Wu, Ma & E, "How SGD Selects the Global Minima", NeurIPS 2018, section 2 (linear stability of a fixed
      point); plain failure: Lewkowycz et al., "The Large Learning Rate Phase of Deep Learning", 2020.
    """
    dataset.check_in_memory("measure_stability", batch, "pass a sample that fits in memory")
    contract.check_params(params)
    values = np.asarray(rates, dtype=np.float64)
    if values.ndim != 1 or len(values) < 3 or not (values > 0).all() or not (np.diff(values) > 0).all():
        raise ValueError(f"rates: expected 3 or more positive numbers in ascending order, got {rates}")
    if not np.isfinite(values).all():
        raise ValueError(f"rates: expected finite numbers, got {rates}")
    rounding = _rounding(params)
    if rounding > jnp.finfo(jnp.float32).eps:
        raise TypeError("params: the differences of gradients need float32 or float64, got leaves in half precision")
    contract.check(loss, params, batch)
    walks = _Walks(loss, params, batch, make_optimizer, opt_state)
    along, plain = _ladder(walks, values.tolist(), jax.random.split(key, num_starts), num_steps)
    growth, at_minus_one = _growth(along, rounding)
    limits = np.array([_crossing(values, row) for row in at_minus_one])
    failed = ~(plain[:, -1] < plain[:, 0])
    first = int(np.argmax(failed)) if failed.any() else len(values)
    ends = np.concatenate([[np.nan], values, [np.nan]])
    return MeasuredStability(
        jnp.asarray(values), jnp.asarray(growth), jnp.asarray(limits), jnp.asarray(plain),
        jnp.asarray(ends[[first, first + 1]]),
    )  # fmt: skip


def starting_distance(params: ArrayTree) -> Array:
    """How far from ω₀ gradients are told apart best: .3 √(rounding) of its length, where the two errors meet."""
    return 0.3 * _rounding(params) ** 0.5 * jnp.maximum(optax.tree.norm(params), 1)


def _rounding(params: ArrayTree) -> float:
    """That of the least precise leaf."""
    return max(float(jnp.finfo(jnp.result_type(x)).eps) for x in jax.tree.leaves(params))


@dataclasses.dataclass(frozen=True)
class _Walks:
    """An optimizer's walks about ω₀, at any rate, on the loss less ⟨tilt, ω⟩.

    Stepped from here and not by compiled loops: so the network compiles once, for all walks, rates and optimizers.
    """

    loss: Loss
    params: ArrayTree
    batch: ArrayTree
    make_optimizer: MakeOptimizer
    opt_state: Any

    def __call__(
        self, d: ArrayTree, tilt: ArrayTree, rate: float, *, stay: bool = False
    ) -> Iterator[tuple[ArrayTree, Array, ArrayTree]]:
        """Where it stands, E there and the update from there; then it stays, or goes on."""
        if self.opt_state is None:
            state = _begin(self.make_optimizer, rate, self.params)
        else:
            under_way = TrainState(self.params, self.opt_state, jnp.zeros((), jnp.int32))
            state = with_rate(self.make_optimizer, under_way, rate).opt_state
        while True:
            value, gradient = _slope(self.loss, self.params, self.batch, d, tilt)
            updates, state = _update(
                self.make_optimizer, self.loss, rate, self.params, self.batch, d, tilt, value, gradient, state
            )
            yield d, value, keep_pace(updates)
            d = d if stay else _moved(d, updates)


def _ladder(walks: _Walks, rates: list[float], keys: Array, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The starts' components along themselves, (D, R, steps), and plain training's losses, (R, T + 1)."""
    params, middle = walks.params, math.exp(np.log(rates).mean())
    at_rest = optax.tree.zeros_like(params)
    value, tilt = _slope(walks.loss, params, walks.batch, at_rest, at_rest)
    every = _updates_a_move(
        dataclasses.replace(walks, loss=_bowl, batch=(params, 0.1 / middle, value)), middle, keys[0]
    )

    def filtered(key: Array) -> ArrayTree:
        d = _start(params, key)
        for _ in range(_FILTER_STEPS):
            *_, (_, _, updates) = itertools.islice(walks(d, tilt, middle / 2, stay=True), every)
            d = _resized(params, optax.tree.sub(d, updates))
        return d

    def along(start: ArrayTree, rate: float) -> list[Array]:
        return [_vdot(d, start) for d, *_ in itertools.islice(walks(start, tilt, rate), _STEPS * every + 1)]

    seen = [[along(start, rate) for rate in rates] for start in map(filtered, keys)]
    plain = [
        [value for _, value, _ in itertools.islice(walks(at_rest, at_rest, rate), num_steps + 1)] for rate in rates
    ]
    return np.array(jax.device_get(seen)), np.array(jax.device_get(plain))


def _updates_a_move(bowl: _Walks, rate: float, key: Array) -> int:
    """How many updates the optimizer takes to move once, where its moves near a fixed point are linear.

    Asked on a bowl, so soft that a search of the rate lengthens its step, since the loss may have kinks.

    Raises:
      TypeError: it does not move, or its moves are not linear.
    """
    at_rest = optax.tree.zeros_like(bowl.params)
    updates_at = lambda d, rate: (updates for _, _, updates in bowl(d, at_rest, rate, stay=True))
    one, other = (_start(bowl.params, k) for k in jax.random.split(key))
    trials = enumerate(itertools.islice(updates_at(one, rate), _PATIENCE), start=1)
    every = next((number for number, updates in trials if optax.tree.norm(updates) > 0), None)
    if every is None:
        raise TypeError(
            f"make_optimizer: none of its first {_PATIENCE} updates by a small gradient moves the params, so it has no "
            "limit that could be measured"
        )
    move = lambda d, rate: next(itertools.islice(updates_at(d, rate), every - 1, None))
    moved = move(one, rate)
    sum_of_two = optax.tree.add(moved, move(other, rate)), move(optax.tree.add(one, other), rate)
    for expected, found in (sum_of_two, (moved, optax.tree.scale(2, move(one, rate / 2)))):
        if not optax.tree.norm(optax.tree.sub(found, expected)) <= _AMISS * optax.tree.norm(expected):
            raise TypeError(
                "make_optimizer: near a fixed point its moves are not linear in the gradient and in the rate (does it "
                "take a sign, search its rate, decay the weights, or begin without second moments?), so that it has no "
                "limit that could be measured; pass the opt_state of a run under way, or use range_test"
            )
    return every


def _bowl(params: ArrayTree, batch: tuple[ArrayTree, Array, Array]) -> Array:
    """½h|ω − ω₀|² + E(ω₀)."""
    centre, curvature, value = batch
    return 0.5 * curvature * optax.tree.norm(optax.tree.sub(params, centre), squared=True) + value


_vdot = jax.jit(optax.tree.vdot)


@jax.jit(static_argnames="make_optimizer")
def _begin(make_optimizer: MakeOptimizer, rate: float, params: ArrayTree) -> Any:
    return make_optimizer(rate).init(params)


@jax.jit
def _start(params: ArrayTree, key: Array) -> ArrayTree:
    return _resized(params, Space.of(params).random(key))


@jax.jit(static_argnames="loss")
def _slope(loss: Loss, params: ArrayTree, batch: ArrayTree, d: ArrayTree, tilt: ArrayTree) -> tuple[Array, ArrayTree]:
    """E at ω₀ + δ, and the gradient of E(ω) − ⟨tilt, ω⟩."""
    value, gradient = jax.value_and_grad(loss)(optax.tree.add(params, d), batch)
    return value, optax.tree.sub(gradient, tilt)


@jax.jit(static_argnames=("make_optimizer", "loss"))
def _update(
    make_optimizer: MakeOptimizer, loss: Loss, rate: float, params: ArrayTree, batch: ArrayTree, d: ArrayTree,
    tilt: ArrayTree, value: Array, gradient: ArrayTree, state: Any,
) -> tuple[ArrayTree, Any]:  # fmt: skip
    """The optimizer's update at ω₀ + δ, and its state; of the loss it is shown the tilted one."""
    point = optax.tree.add(params, d)
    tilted = lambda p: loss(p, batch) - optax.tree.vdot(tilt, optax.tree.sub(p, params))
    return with_extra_args(make_optimizer(rate)).update(
        gradient, state, point,
        value=value - optax.tree.vdot(tilt, d), grad=gradient, value_fn=ValueFn(tilted, point),
    )  # fmt: skip


_moved = jax.jit(optax.apply_updates)


@jax.jit
def _resized(params: ArrayTree, d: ArrayTree) -> ArrayTree:
    return optax.tree.scale(starting_distance(params) / optax.tree.norm(d), d)


def _growth(along: np.ndarray, rounding: float) -> tuple[np.ndarray, np.ndarray]:
    """The larger root of z² − az − b, in size, and that polynomial at −1, through which the root leaves.

    Without momentum there is one root alone, z − a, and its polynomial is taken.
    """
    growth, at_minus_one = np.full((2, *along.shape[:-1]), np.nan)
    for index in np.ndindex(growth.shape):
        s = along[index] / along[index][0]
        # Between two moves it stands still.
        s = s[np.append(True, np.diff(s) != 0)]
        # What has grown by so much has left the neighbourhood in which the loss is quadratic.
        stop = int(np.argmin(np.append(np.abs(s) < 1e3, False)))
        # Near η = 1/λ_max the start is gone within the first steps, and the signs of what is left are chance.
        s = s[: min(stop, int(np.argmax(np.append(np.abs(s), 0) < 1e-4)))]
        if len(s) < 4:
            continue
        # Later iterates may be those of another rate, which the optimizer has taken: as many as follow one recursion.
        fits = [_recursion(s[:length], rounding) for length in range(len(s), min(len(s), _FEWEST) - 1, -1)]
        missed, a, b, rank = next((fit for fit in fits if fit[0] <= 0.1 * _AMISS), min(fits))
        if missed > _AMISS:
            continue
        roots = np.roots([1, -a, -b])
        largest = roots[np.argmax(np.abs(roots))]
        if largest.real < 0:
            growth[index] = np.abs(largest)
            at_minus_one[index] = 1 + a - b if rank == 2 else 1 - np.abs(largest)
    return growth, at_minus_one


def _recursion(s: np.ndarray, rounding: float) -> tuple[float, float, float, int]:
    """What s_{t+1} = a s_t + b s_{t−1} misses, relative; a and b; and how many of them the iterates tell."""
    sides = np.stack([s[1:-1], s[:-2]], axis=1)
    (a, b), _, rank, _ = np.linalg.lstsq(sides, s[2:], rcond=max(1e-3, 30 * rounding**0.5))
    return float(np.linalg.norm(sides @ (a, b) - s[2:]) / np.linalg.norm(s[2:])), float(a), float(b), int(rank)


def _crossing(rates: np.ndarray, at_minus_one: np.ndarray) -> float:
    """Where the root passes −1, between two rates that oscillate: the polynomial there is linear in η."""
    for i in range(len(rates) - 1):
        low, high = at_minus_one[i : i + 2]
        if low >= 0 > high:
            return float(rates[i] + low / (low - high) * (rates[i + 1] - rates[i]))
    return float("nan")
