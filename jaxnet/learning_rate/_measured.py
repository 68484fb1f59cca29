"""Where training really loses stability, found from gradients alone on a ladder of rates."""

import dataclasses
import functools
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

# The oscillation's growth is taken from so many steps: what negative curvature makes of rounding errors stays small.
_STEPS = 12
_FILTER_STEPS = 100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeasuredStability:
    """An optimizer at each of R rates, twice: about a fixed point, and plainly.

    Attributes:
      rates: (R,) ascending η.
      growth: (D, R) factor a step by which the oscillation about the fixed point grows, for D random starts; NaN
        where the iterates do not oscillate.
      limits: (D,) the rate at which the growth passes 1; NaN where the ladder does not hold it.
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

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: ω₀.
      batch: the examples, all of them at each step.
      make_optimizer: the maker, such as `optax.sgd`, called with each rate; weight decay belongs into the loss, or ω₀
        is no fixed point.
      rates: (R,) ascending; their geometric middle should be near the limit expected.
      key: a `jax.random.key` for the random starts.
      opt_state: the state to start in, such as Adam's second moments, its momentum zero; by default a fresh one.
      num_starts: D, how many starts; their spread is the error of the limit.
      num_steps: T, the steps of plain training.

    Returns:
      A `MeasuredStability`.

    Raises:
      TypeError: the params are in half precision.
      ValueError: the rates are not ascending, positive and finite, or fewer than 3.

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
    dtype = jnp.result_type(*jax.tree.leaves(params))
    if jnp.finfo(dtype).eps > jnp.finfo(jnp.float32).eps:
        raise TypeError(f"params: the differences of gradients need float32 or float64, got {dtype}")
    contract.check(loss, params, batch)
    along, plain = _ladder(
        loss, params, batch, values.tolist(), jax.random.split(key, num_starts), make_optimizer, opt_state, num_steps
    )
    growth, at_minus_one = _growth(along, float(jnp.finfo(dtype).eps))
    limits = np.array([_crossing(values, *rows) for rows in zip(growth, at_minus_one, strict=True)])
    failed = ~(plain[:, -1] < plain[:, 0])
    first = int(np.argmax(failed)) if failed.any() else len(values)
    ends = np.concatenate([[np.nan], values, [np.nan]])
    return MeasuredStability(
        jnp.asarray(values), jnp.asarray(growth), jnp.asarray(limits), jnp.asarray(plain),
        jnp.asarray(ends[[first, first + 1]]),
    )  # fmt: skip


def starting_distance(params: ArrayTree) -> Array:
    """How far from ω₀ gradients are told apart best: .3 √(rounding) of its length, where the two errors meet."""
    dtype = jnp.result_type(*jax.tree.leaves(params))
    return 0.3 * jnp.finfo(dtype).eps ** 0.5 * jnp.maximum(optax.tree.norm(params), 1)


def _ladder(
    loss: Loss,
    params: ArrayTree,
    batch: ArrayTree,
    rates: list[float],
    keys: Array,
    make_optimizer: MakeOptimizer,
    opt_state: Any,
    num_steps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The starts' components along themselves, (D, R, steps), and plain training's losses, (R, T + 1).

    Stepped from here and not by compiled loops: so the network compiles once, for all walks, rates and optimizers.
    """
    slope = functools.partial(_slope, loss, params, batch)
    at_rest, _ = _begin(make_optimizer, 1.0, params)
    _, tilt = slope(at_rest, at_rest)

    def state_at(rate: float) -> Any:
        return _begin(make_optimizer, rate, params)[1] if opt_state is None else opt_state

    def filtered(key: Array) -> ArrayTree:
        rate = math.exp(np.log(rates).mean()) / 2
        d, state = _start(params, key), state_at(rate)
        for _ in range(_FILTER_STEPS):
            d = _uphill(make_optimizer, rate, params, d, slope(d, tilt)[1], state)
        return d

    def walk(d: ArrayTree, tilt: ArrayTree, rate: float, num_steps: int) -> Iterator[tuple[ArrayTree, Array]]:
        state = state_at(rate)
        for _ in range(num_steps + 1):
            value, gradient = slope(d, tilt)
            yield d, value
            d, state = _downhill(make_optimizer, rate, params, d, gradient, state)

    starts = [filtered(key) for key in keys]
    along = [[[_vdot(d, start) for d, _ in walk(start, tilt, rate, _STEPS)] for rate in rates] for start in starts]
    plain = [[value for _, value in walk(at_rest, at_rest, rate, num_steps)] for rate in rates]
    return np.array(jax.device_get(along)), np.array(jax.device_get(plain))


_vdot = jax.jit(optax.tree.vdot)


@jax.jit(static_argnames="make_optimizer")
def _begin(make_optimizer: MakeOptimizer, rate: float, params: ArrayTree) -> tuple[ArrayTree, Any]:
    """δ = 0 and a fresh state."""
    return optax.tree.zeros_like(params), make_optimizer(rate).init(params)


@jax.jit
def _start(params: ArrayTree, key: Array) -> ArrayTree:
    return _resized(params, Space.of(params).random(key))


@jax.jit(static_argnames="loss")
def _slope(loss: Loss, params: ArrayTree, batch: ArrayTree, d: ArrayTree, tilt: ArrayTree) -> tuple[Array, ArrayTree]:
    """E at ω₀ + δ, and the gradient of E(ω) − ⟨tilt, ω⟩."""
    value, gradient = jax.value_and_grad(loss)(optax.tree.add(params, d), batch)
    return value, optax.tree.sub(gradient, tilt)


@jax.jit(static_argnames="make_optimizer")
def _downhill(
    make_optimizer: MakeOptimizer, rate: float, params: ArrayTree, d: ArrayTree, gradient: ArrayTree, state: Any
) -> tuple[ArrayTree, Any]:
    """δ after a step, and the optimizer's state."""
    update = optax.with_extra_args_support(make_optimizer(rate)).update
    updates, state = update(gradient, state, optax.tree.add(params, d))
    return optax.apply_updates(d, updates), state


@jax.jit(static_argnames="make_optimizer")
def _uphill(
    make_optimizer: MakeOptimizer, rate: float, params: ArrayTree, d: ArrayTree, gradient: ArrayTree, state: Any
) -> ArrayTree:
    """δ after a step the other way, at its old length."""
    updates, _ = optax.with_extra_args_support(make_optimizer(rate)).update(gradient, state, params)
    return _resized(params, optax.tree.sub(d, updates))


def _resized(params: ArrayTree, d: ArrayTree) -> ArrayTree:
    return optax.tree.scale(starting_distance(params) / optax.tree.norm(d), d)


def _growth(along: np.ndarray, rounding: float) -> tuple[np.ndarray, np.ndarray]:
    """The larger root of z² − az − b, in size, and that polynomial at −1, through which the root leaves.

    Without momentum there is one root alone, z − a, and its polynomial is taken.
    """
    growth, at_minus_one = np.full((2, *along.shape[:-1]), np.nan)
    for index in np.ndindex(growth.shape):
        s = along[index] / along[index][0]
        # What has grown by so much has left the neighbourhood in which the loss is quadratic.
        stop = int(np.argmin(np.append(np.abs(s) < 1e3, False)))
        # Near η = 1/λ_max the start is gone within the first steps, and the signs of what is left are chance.
        s = s[: min(stop, int(np.argmax(np.append(np.abs(s), 0) < 1e-4)))]
        if len(s) < 4:
            continue
        (a, b), _, rank, _ = np.linalg.lstsq(
            np.stack([s[1:-1], s[:-2]], axis=1), s[2:], rcond=max(1e-3, 30 * rounding**0.5)
        )
        roots = np.roots([1, -a, -b])
        largest = roots[np.argmax(np.abs(roots))]
        if largest.real < 0:
            growth[index] = np.abs(largest)
            at_minus_one[index] = 1 + a - b if rank == 2 else 1 - np.abs(largest)
    return growth, at_minus_one


def _crossing(rates: np.ndarray, growth: np.ndarray, at_minus_one: np.ndarray) -> float:
    """Where the growth passes 1, between two rates that oscillate: the polynomial at −1 is linear in η."""
    for i in range(len(rates) - 1):
        if growth[i] <= 1 < growth[i + 1]:
            low, high = at_minus_one[i : i + 2]
            return float(rates[i] + low / (low - high) * (rates[i + 1] - rates[i]))
    return float("nan")
