"""A rate for an optimizer at a batch size: from where training begins, and from where a short run leads."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, MakeOptimizer
from jaxnet.curvature import eigsh, flattened, hessian
from jaxnet.data import reshuffled
from jaxnet.learning_rate._forms import parts_known
from jaxnet.learning_rate._point import Point, limits, look, noise_share, with_errors
from jaxnet.learning_rate._point import greedy as greedy_of
from jaxnet.learning_rate._response import alternating
from jaxnet.learning_rate._second_moments import FOLLOWED, ends, num_spanning
from jaxnet.learning_rate._settled import at_constant_rate, check_maker, check_proportional, recursion
from jaxnet.learning_rate._signs import takes_sign
from jaxnet.training import init_state, make_update, trajectory

# So many examples are looked at, or an eighth of all; of few a fifth, and no fewer than the last.
_SAMPLE, _FEWEST = 256, 32
# Steps of the probe run at least, and how often it may fail and begin anew at a quarter of its rate. What a rate may
# cost, in gradients of all examples, shortens a run whose batches are nearly all of them.
_STEPS, _TRIES, _BUDGET = 8, 4, 30
# What the bracket's ends leave to the examples that were not looked at, as a factor, and to the directions that were
# not, as a power of the share of the trace that was. Chosen by trial, since of these there is no bound.
_MARGIN, _POWER = 1.08, 0.25


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DerivedRates:
    """The rates of an optimizer at S batch sizes, and what they follow from; arrays are (S,).

    Attributes:
      rate: √(greedy · ½ later_limit), the rate to train at; NaN where no step from here lowers the loss.
      greedy: g·Rg/(Rg·CRg + p tr(RCRΣ)), which lowers the expected loss most in one step from here.
      largest: λ_max(R^½HR^½ + D) here, on all examples, for a rate of 1; NaN for signs.
      scatter: p q, what noise adds to it: 2/(λ + p q) is where the mean square begins to grow.
      limit: that rate, within its bracket.
      low, high: the bracket.
      later_limit: 2/(λ + p q) where the probe run ended.
      *_error: standard errors, over the random directions and the examples used.
      probe_rate: the rate of the probe run.
      probe_losses: the loss before it and after it.
      num_gradients: the cost, in gradients of all N examples, for each batch size, ``largest`` and the bracket apart.
        At most about 30 from N = 150 on, since no fewer than 32 examples are looked at.
      batch_sizes: B, rising.
      probe_batch_size: of the probe run.
      signs: whether the optimizer takes signs, and so has no limit.
    """

    rate: Array
    rate_error: Array
    greedy: Array
    greedy_error: Array
    largest: Array
    scatter: Array
    scatter_error: Array
    limit: Array
    low: Array
    high: Array
    later_limit: Array
    later_limit_error: Array
    probe_rate: Array
    probe_losses: Array
    num_gradients: Array
    batch_sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    probe_batch_size: int = dataclasses.field(metadata={"static": True})
    signs: bool = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is asked, and the examples looked at."""

    loss: Loss
    params: ArrayTree
    data: Any
    n: int
    make_optimizer: MakeOptimizer
    batch_sizes: tuple[int, ...]
    signs: bool
    sample: Any
    used: int
    look_key: Array

    def points(self, params: ArrayTree, opt_state: Any) -> list[Point]:
        return look(
            self.loss, self.make_optimizer, self.sample, self.n, self.batch_sizes, self.look_key, params, opt_state,
            signs=self.signs,
        )  # fmt: skip

    def spent(self, points: list[Point]) -> np.ndarray:
        """The cost in gradients of all examples."""
        return np.array([point.num_gradients for point in points]) * (self.used / self.n)

    @property
    def middle(self) -> int:
        """Which of the batch sizes the probe run has."""
        sizes = np.array(self.batch_sizes)
        return int(np.argmin(np.abs(np.log(sizes**2 / (sizes[0] * sizes[-1])))))


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
    top: float,
    second_moments: bool,
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
      top: λ_max of the Hessian here, on all examples.
      second_moments: narrow the bracket by them, where the loss is of `mean_loss` and the examples are in memory.

    Raises:
      TypeError: the optimizer's update is not proportional to a small gradient, or a part of it is not known.
      ValueError: there is a state, of an optimizer that takes signs.
    """
    check_maker(make_optimizer, params)
    signs = takes_sign(make_optimizer, params)
    if not signs:
        check_proportional(make_optimizer, params)
    elif opt_state is not None:
        raise ValueError("opt_state: the limit of an optimizer that takes signs is in no state of it; leave it out")
    n = dataset.num_examples(data)
    sample_key, look_key, probe_key = three_keys(key)
    sample, used = _sample(data, n, sample_key)
    task = _Task(loss, params, data, n, make_optimizer, batch_sizes, signs, sample, used, look_key)
    here = task.points(params, opt_state)
    standing = _standing(task, here, tol, top, second_moments)
    going = _after_a_run(task, here, probe_key) if opt_state is None else _under_way(task, here, standing["limit"])
    arrays = jax.device_put({name: np.asarray(values) for name, values in (standing | going).items()})
    return DerivedRates(**arrays, batch_sizes=batch_sizes, probe_batch_size=batch_sizes[task.middle], signs=signs)


def _standing(task: _Task, here: list[Point], tol: float, top: float, second_moments: bool) -> dict[str, np.ndarray]:
    """The limit here, what it is made of, and two rates around it."""
    sharpest, worst = (np.array([getattr(point, name) for point in here]) for name in ("sharpest", "worst"))
    scatter, scatter_error = with_errors(here, "scatter")
    # An estimate above what the sharpest direction alone bears would be a permit that does not hold.
    scatter = np.maximum(scatter, sharpest)
    # However short a sign's steps are, they do not shrink with the gradient: about a minimum no rate is stable.
    largest = np.full_like(scatter, np.nan) if task.signs else _largest(task, here, tol, top)
    low, high = 2 / (largest + worst), 2 / (largest + sharpest)
    if second_moments and not task.signs:
        for i, (later, earlier) in enumerate(_by_second_moments(task, here, largest)):
            if np.isfinite([later, earlier]).all():
                low[i], high[i] = np.fmax(low[i], later), np.fmin(high[i], earlier)
    limit = np.fmax(np.fmin(2 / (largest + scatter), high), low)
    return {
        "largest": largest,
        "scatter": scatter,
        "scatter_error": scatter_error,
        "limit": limit,
        "low": low,
        "high": high,
    }


def _by_second_moments(task: _Task, here: list[Point], largest: np.ndarray) -> Iterator[tuple[float, float]]:
    """Two rates around the limit for each batch size; nothing where they cannot be had."""
    weights, spanning = recursion(task.make_optimizer, task.params), num_spanning(task.params, task.n)
    precise = all(jnp.finfo(x.dtype).bits >= 32 for x in jax.tree.leaves(task.params))
    if not (parts_known(task.loss) and precise and weights and spanning) or dataset.on_host(task.data):
        return
    examples = _drawn(task.data, task.look_key, min(task.n, FOLLOWED))
    for size, point, top in zip(task.batch_sizes, here, largest, strict=True):
        share = noise_share(size, task.n)
        if share == 0:
            yield float(2 / top), float(2 / top)
            continue
        found = ends(
            task.loss, task.params, examples, point.root, weights, float(task.n), share, float(top),
            task.look_key, spanning=spanning,
        )  # fmt: skip
        later, earlier, followed = map(float, found)
        margin = _MARGIN * max(1, float(point.trace) / followed) ** _POWER
        yield later / margin, earlier * margin


def _under_way(task: _Task, here: list[Point], limit: np.ndarray) -> dict[str, Any]:
    """The rate in a state of the optimizer: half of the limit.

    The best single step falls there as the gradient does, and says nothing of a run.
    """
    greedy, greedy_error = greedy_of(here)
    error = limits(here)[1]
    return {
        "rate": limit / 2,
        "rate_error": error / 2,
        "greedy": greedy,
        "greedy_error": greedy_error,
        "later_limit": limit,
        "later_limit_error": error,
        "probe_rate": np.nan,
        "probe_losses": np.full(2, np.nan),
        "num_gradients": task.spent(here),
    }


def _after_a_run(task: _Task, here: list[Point], key: Array) -> dict[str, Any]:
    """The rate, by the best single step here and the limit where a run at it leads."""
    greedy, greedy_error = greedy_of(here)
    first = min(greedy[task.middle], limits(here)[0][task.middle] / 2)
    looked = task.spent(here)
    # A second look, where the run ends, costs about as much as the first; a search may take longer there.
    after, losses, tries, ran = _descend(task, first, key=key, budget=_BUDGET - 2.1 * float(looked.max()))
    # The quadratic model promised a gain; where there was none, it holds less far than it says.
    first, greedy = (rate / 4 ** (tries - 1) for rate in (first, greedy))
    spent = looked + ran
    later = later_error = np.full_like(greedy, np.nan)
    if after is not None:
        there = task.points(after, None)
        later, later_error = limits(there)
        spent = spent + task.spent(there)
    rate = np.sqrt(greedy * later / 2)
    return {
        "rate": rate,
        "rate_error": rate / 2 * np.hypot(greedy_error / greedy, later_error / later),
        "greedy": greedy,
        "greedy_error": greedy_error,
        "later_limit": later,
        "later_limit_error": later_error,
        "probe_rate": first,
        "probe_losses": losses,
        "num_gradients": spent,
    }


def _descend(task: _Task, rate: float, *, key: Array, budget: float) -> tuple[Any, np.ndarray, int, float]:
    """Where a run that lowers the loss leads, its losses, how many it took, each at a quarter of the rate; the cost."""
    losses, spent, size = np.full(2, np.nan), 0.0, task.batch_sizes[task.middle]
    if not (np.isfinite(rate) and rate > 0):
        return None, losses, 1, spent
    for tries in range(1, _TRIES + 1):
        affordable = int((budget - spent - 2 * task.used / task.n) * task.n / size)
        steps = max(1, min(max(_STEPS, -(-task.n // size)), affordable))
        after, losses = _probe(task, rate / 4 ** (tries - 1), key=key, size=size, steps=steps)
        spent += (steps * size + 2 * task.used) / task.n
        if losses[1] < losses[0]:
            return after, losses, tries, spent
    return None, losses, _TRIES, spent


def _largest(task: _Task, points: list[Point], tol: float, top: float) -> np.ndarray:
    """λ_max(R^½HR^½ + D) for each batch size, each search from the last one's vector; H's own largest is at hand."""
    values: list[float] = []
    before, vector = None, None
    for point in points:
        root, decay = point.response
        # Without second moments R does not depend on the batch size.
        same = before is not None and all(map(np.array_equal, *map(jax.tree.leaves, (before, point.response))))
        numbers = [np.concatenate([np.ravel(x) for x in part]) for part in point.response]
        if all(np.ptp(x) == 0 for x in numbers):
            # One number for all of the params: what is known of H answers.
            value = float(numbers[0][0]) ** 2 * top + float(numbers[1][0])
        elif not same:
            op = alternating(flattened(hessian(task.loss, task.params, task.data)), root, decay)
            pairs = eigsh(op, tol=tol, key=task.look_key, v0=vector)
            value, vector = float(pairs.values[0]), jax.tree.map(lambda x: x[0], pairs.vectors)
        values.append(value)
        before = point.response
    return np.array(values)


def _sample(data: Any, n: int, key: Array) -> tuple[Any, int]:
    """Some of the examples: so many that the cost stays within a few gradients of all of them."""
    used = min(n, max(n // 8, min(n // 5, _SAMPLE), _FEWEST))
    if dataset.on_host(data) or used == n:
        return data, n
    return _drawn(data, key, used), used


@jax.jit
def three_keys(key: Array) -> tuple[Array, ...]:
    """As by `jax.random.split`, in one program."""
    return tuple(jax.random.split(key, 3))


@functools.partial(dataset.jit, static_argnames="count")
def _drawn(data: Any, key: Array, count: int) -> Any:
    rows = jax.random.choice(key, contract.num_examples(data), (count,), replace=False)
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], data)


def _probe(task: _Task, rate: float, *, key: Array, size: int, steps: int) -> tuple[ArrayTree, np.ndarray]:
    """Where so many steps at a rate lead, and the loss on the sample before and after."""
    params, make = task.params, task.make_optimizer
    eta = jnp.asarray(rate, jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32))
    value = lambda p: float(_mean_loss(task.loss, task.sample, p))
    if dataset.on_host(task.data):
        step = functools.partial(_streamed_step, task.loss, make, eta)
        after = trajectory(step, _begin(make, eta, params), task.data)[0].params
    else:
        after = _run(task.loss, make, params, task.data, eta, key, size=size, steps=steps)
    return after, np.array([value(params), value(after)])


@functools.partial(dataset.jit, static_argnames="loss")
def _mean_loss(loss: Loss, data: Any, params: ArrayTree) -> Array:
    return jnp.asarray(dataset.mean(_Value(loss), data, params))


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
