"""A rate for an optimizer at a batch size: from where training begins, and from where a short run leads."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, MakeOptimizer
from jaxnet.curvature import eigsh, hessian
from jaxnet.data import reshuffled
from jaxnet.learning_rate._point import Point, limits, look, with_errors
from jaxnet.learning_rate._point import greedy as greedy_of
from jaxnet.learning_rate._response import alternating, at_constant_rate, check_maker, check_proportional
from jaxnet.learning_rate._signs import takes_sign
from jaxnet.training import init_state, make_update, trajectory

# So many examples are looked at, or an eighth of all; of few a quarter, and no fewer than the last.
_SAMPLE, _FEWEST = 256, 32
# Steps of the probe run at least, and how often it may fail and begin anew at a quarter of its rate.
_STEPS, _TRIES = 8, 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DerivedRates:
    """The rates of an optimizer at S batch sizes, and what they follow from; arrays are (S,).

    Attributes:
      rate: √(greedy · ½ later_limit), the rate to train at; NaN where no step from here lowers the loss.
      greedy: g·Rg/(Rg·CRg + p tr(RCRΣ)), which lowers the expected loss most in one step from here.
      largest: λ_max(R^½HR^½ + D) here, on all examples, for a rate of 1; NaN for signs.
      scatter: p q, at least ``sharpest``, what noise adds to it: 2/(λ + p q) is where the mean square begins to grow.
      sharpest: p Var(v′C_nv)/λ, the least that it adds, along the sharpest direction v.
      worst: p max tr C_n, more than it adds; NaN where C_n are Hessians.
      later_limit: 2/(λ + p q) where the probe run ended.
      *_error: standard errors, over the random directions and the examples used.
      probe_rate: the rate of the probe run.
      probe_losses: the loss before it and after it.
      num_gradients: the cost, in gradients of all N examples, for each batch size.
      batch_sizes: B, rising.
      probe_batch_size: of the probe run.
    """

    rate: Array
    rate_error: Array
    greedy: Array
    greedy_error: Array
    largest: Array
    scatter: Array
    scatter_error: Array
    sharpest: Array
    worst: Array
    later_limit: Array
    later_limit_error: Array
    probe_rate: Array
    probe_losses: Array
    num_gradients: Array
    batch_sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    probe_batch_size: int = dataclasses.field(metadata={"static": True})


def derive(
    loss: Loss,
    params: ArrayTree,
    data: Any,
    make_optimizer: MakeOptimizer,
    batch_sizes: tuple[int, ...],
    *,
    opt_state: Any,
    key: Array,
    tol: float,
) -> DerivedRates:
    """The rates of an optimizer at each batch size.

    Args:
      loss: a mean over independent examples.
      params: the point where training begins.
      data: N examples, or a `dataset.Stream`, whose batches are then the probe run's.
      make_optimizer: a maker such as `optax.adam`.
      batch_sizes: rising, from 1 to N.
      opt_state: its state where training is under way, or None.
      key: for the examples used, the random directions and the probe run's order.
      tol: relative accuracy of ``largest``.

    Raises:
      TypeError: the optimizer's update is not proportional to a small gradient, or a part of it is not known.
    """
    check_maker(make_optimizer, params)
    signs = bool(takes_sign(make_optimizer, params))
    if not signs:
        check_proportional(make_optimizer, params)
    elif opt_state is not None:
        raise ValueError("opt_state: the limit of an optimizer that takes signs is in no state of it; leave it out")
    n = dataset.num_examples(data)
    sample_key, look_key, probe_key = jax.random.split(key, 3)
    sample, used = _sample(data, n, sample_key)
    at = functools.partial(look, loss, make_optimizer, sample, n, batch_sizes, look_key, signs=signs)
    here = at(params, opt_state)
    greedy, greedy_error = greedy_of(here)
    limit, limit_error = limits(here)
    sharpest = np.array([point.sharpest for point in here])
    scatter, scatter_error = with_errors(here, "scatter")
    # An estimate above what the sharpest direction alone bears would be a permit that does not hold.
    scatter = np.maximum(scatter, sharpest)
    # However short a sign's steps are, they do not shrink with the gradient: about a minimum no rate is stable.
    largest = np.full_like(greedy, np.nan) if signs else _largest(loss, params, data, here, key=look_key, tol=tol)
    middle = int(np.argmin(np.abs(np.log(np.square(batch_sizes) / (batch_sizes[0] * batch_sizes[-1])))))
    size = batch_sizes[middle]
    spent = _spent(here, used / n)
    first, losses = min(greedy[middle], limit[middle] / 2), np.full(2, np.nan)
    if opt_state is not None:
        # Under way the best single step falls as the gradient does, and says nothing of a run: the limit alone counts.
        later = 2 / (largest + scatter)
        later_error = later * limit_error / limit
        rate, rate_error = later / 2, later_error / 2
    else:
        steps = max(_STEPS, -(-n // size))
        run = functools.partial(
            _probe, loss, make_optimizer, params, data, sample, key=probe_key, size=size, steps=steps
        )
        after, losses, tries = _descend(run, first)
        # The quadratic model promised a gain; where there was none, it holds less far than it says.
        first, greedy = (rate / 4 ** (tries - 1) for rate in (first, greedy))
        spent = spent + tries * (steps * size + 2 * used) / n
        later = later_error = np.full_like(greedy, np.nan)
        if after is not None:
            there = at(after, None)
            later, later_error = limits(there)
            spent = spent + _spent(there, used / n)
        rate = np.sqrt(greedy * later / 2)
        rate_error = rate / 2 * np.hypot(greedy_error / greedy, later_error / later)
    arrays = {
        "rate": rate,
        "rate_error": rate_error,
        "greedy": greedy,
        "greedy_error": greedy_error,
        "largest": largest,
        "scatter": scatter,
        "scatter_error": scatter_error,
        "sharpest": sharpest,
        "worst": [point.worst for point in here],
        "later_limit": later,
        "later_limit_error": later_error,
        "probe_rate": first,
        "probe_losses": losses,
        "num_gradients": spent,
    }
    return DerivedRates(
        **{name: jnp.asarray(values) for name, values in arrays.items()}, batch_sizes=batch_sizes, probe_batch_size=size
    )


def _spent(points: list[Point], share: float) -> np.ndarray:
    """The cost in gradients of all examples."""
    return np.array([point.num_gradients for point in points]) * share


def _descend(run: Callable[[float], tuple[ArrayTree, np.ndarray]], rate: float) -> tuple[Any, np.ndarray, int]:
    """Where a run that lowers the loss leads, its losses, and how many were tried: each at a quarter of the rate."""
    losses = np.full(2, np.nan)
    if not (np.isfinite(rate) and rate > 0):
        return None, losses, 1
    for tries in range(1, _TRIES + 1):
        after, losses = run(rate / 4 ** (tries - 1))
        if losses[1] < losses[0]:
            return after, losses, tries
    return None, losses, _TRIES


def _largest(loss: Loss, params: ArrayTree, data: Any, points: list[Point], *, key: Array, tol: float) -> np.ndarray:
    """λ_max(R^½HR^½ + D) for each batch size, each search from the last one's vector."""
    values: list[float] = []
    before, vector = None, None
    for point in points:
        root, decay = point.response
        # Without second moments R does not depend on the batch size.
        same = before is not None and all(map(np.array_equal, *map(jax.tree.leaves, (before, point.response))))
        if not same:
            pairs = eigsh(alternating(hessian(loss, params, data), root, decay), tol=tol, key=key, v0=vector)
            value, vector = float(pairs.values[0]), jax.tree.map(lambda x: x[0], pairs.vectors)
        values.append(value)
        before = point.response
    return np.array(values)


def _sample(data: Any, n: int, key: Array) -> tuple[Any, int]:
    """Some of the examples: so many that the cost stays within a few gradients of all of them."""
    used = min(n, max(n // 8, min(n // 4, _SAMPLE), _FEWEST))
    if dataset.on_host(data) or used == n:
        return data, n
    rows = jax.random.choice(key, n, (used,), replace=False)
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], data), used


def _probe(
    loss: Loss,
    make_optimizer: MakeOptimizer,
    params: ArrayTree,
    data: Any,
    sample: Any,
    rate: float,
    *,
    key: Array,
    size: int,
    steps: int,
) -> tuple[ArrayTree, np.ndarray]:
    """Where so many steps at a rate lead, and the loss on the sample before and after."""
    eta = jnp.asarray(rate, jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32))
    value = lambda p: dataset.mean(_Value(loss), sample, p)
    if dataset.on_host(data):
        state, _ = trajectory(
            functools.partial(_streamed_step, loss, make_optimizer, eta), _begin(make_optimizer, eta, params), data
        )
        after = state.params
    else:
        after = _run(loss, make_optimizer, params, data, eta, key, size=size, steps=steps)
    return after, np.array([float(value(params)), float(value(after))])


@dataclasses.dataclass(frozen=True)
class _Value:
    loss: Loss

    def __call__(self, batch: Any, params: ArrayTree) -> Array:
        return self.loss(params, batch)


@functools.partial(jax.jit, static_argnames=("loss", "make_optimizer", "size", "steps"))
def _run(
    loss: Loss, make_optimizer: MakeOptimizer, params: ArrayTree, data: ArrayTree, rate: Array, key: Array, *,
    size: int, steps: int,
) -> ArrayTree:  # fmt: skip
    n = contract.num_examples(data)
    passes = -(-steps * size // n)
    order = jax.vmap(lambda epoch: reshuffled(key, epoch, n))(jnp.arange(passes)).ravel()[: steps * size]
    optimizer = at_constant_rate(make_optimizer, rate)
    update = make_update(loss, optimizer)
    step = lambda state, rows: update(state, jax.tree.map(lambda x: x[rows], data))
    return trajectory(step, init_state(params, optimizer), order.reshape(steps, size))[0].params


@functools.partial(jax.jit, static_argnames="make_optimizer")
def _begin(make_optimizer: MakeOptimizer, rate: Array, params: ArrayTree) -> Any:
    return init_state(params, at_constant_rate(make_optimizer, rate))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _streamed_step(loss: Loss, make_optimizer: MakeOptimizer, rate: Array, state: Any, batch: Any) -> Any:
    return make_update(loss, at_constant_rate(make_optimizer, rate))(state, batch)
