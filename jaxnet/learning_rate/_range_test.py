"""The learning-rate range test: the loss while the rate rises, and what is commonly read off it, beside the theory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, MakeOptimizer, check_batch_size
from jaxnet.data import reshuffled
from jaxnet.learning_rate._analysis import Analysis, analyse, name_of
from jaxnet.training import TrainState, init_state, make_update, trajectory, with_rate


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The curve of a range test over R rates, and the rates that it and the theory suggest.

    A suggestion without a meaning is NaN: no minimum inside the curve, no fall, another optimizer than plain SGD.

    Attributes:
      rates: (R,) ascending η.
      loss: (R,) after the steps at each rate, each on the batch of the next step.
      smoothed: (R,) the debiased exponential mean of ``loss``; NaN from ``diverged`` on.
      start_loss: before the first step.
      diverged: the index of the first rate at which the test had diverged, R if it did not; no suggestion looks at it.
      steepest: where ``smoothed`` falls fastest against log η on the way to its minimum.
      tenth_of_minimum: a tenth of the rate at its minimum.
      valley: the middle, on the log axis, of its longest decreasing subsequence.
      optimal: 1/λ_max at the start, for the full batch.
      maximal: 2/λ_max at the start, for the full batch.
      derived: η(B), the rate that `analyse` derives for this optimizer and batches of this size; NaN where none is.
      batch_size: B, None for the full batch.
    """

    rates: Array
    loss: Array
    smoothed: Array
    start_loss: Array
    diverged: Array
    steepest: Array
    tenth_of_minimum: Array
    valley: Array
    optimal: Array
    maximal: Array
    derived: Array
    batch_size: int | None = dataclasses.field(metadata={"static": True})

    @property
    def suggestions(self) -> dict[str, Array]:
        """Name -> rate: three read off the curve, then those of the theory."""
        derived = {} if self.batch_size is None else {f"η(B = {self.batch_size})": self.derived}
        return {
            "steepest": self.steepest,
            "minimum/10": self.tenth_of_minimum,
            "valley": self.valley,
            "1/λ_max": self.optimal,
            "2/λ_max": self.maximal,
            **derived,
        }

    @property
    def diverged_rate(self) -> Array:
        """The rate at ``diverged``; NaN if the test did not diverge."""
        return jnp.append(self.rates, jnp.nan)[self.diverged]

    def rows(self) -> list[tuple[str, Any, str]]:
        """The lines of its table: (quantity, value, remark)."""
        remarks = {
            "steepest": ("curve: the loss falls fastest", "the loss never falls"),
            "minimum/10": ("curve: a tenth of the lowest point's rate", "its minimum is at an end of the rates"),
            "valley": ("curve: the middle of the longest descent", "the loss never falls"),
            "1/λ_max": ("theory at the start: full batch, optimal", _NOT_PLAIN),
            "2/λ_max": ("theory at the start: full batch, limit of stability", _NOT_PLAIN),
        }
        of_batch = ("theory: from noise and curvature, here and after a short run", "none is known for this optimizer")
        rows: list[tuple[str, Any, str]] = []
        for name, value in self.suggestions.items():
            known, unknown = remarks.get(name, of_batch)
            rows.append((name, float(value), known if np.isfinite(value) else f"no figure: {unknown}"))
        end = float(self.diverged_rate)
        lasted = "the curve ends here" if np.isfinite(end) else "no figure: it did not, up to the last rate"
        return [*rows, ("diverged at", end, lasted)]

    def __str__(self) -> str:
        """The table as plain text."""
        return "\n".join(f"{name:24} {value:12.5g}  {remark}" for name, value, remark in self.rows())


_NOT_PLAIN = "it holds for plain SGD, u = −ηg, only"


@contract.takes_loss
@dataset.on_automatic_axes
def range_test(
    loss: Loss,
    start: ArrayTree | TrainState,
    data: ArrayTree,
    make_optimizer: MakeOptimizer,
    *,
    learning_rates: ArrayLike,
    batch_size: int | None,
    key: Array,
    steps_per_rate: int = 1,
    smoothing: float = 0.8,
    analysis: Analysis | None = None,
) -> RangeTest:
    """Train while the rate rises from step to step, and read rates off the loss; beside them, the theory's.

    The loss L_i that stands at rate η_i is the one *after* the steps at η_i, on the batch of the next step.
    It is smoothed to the debiased exponential mean S_i = Σ_j β^|i−j| L_j / Σ_j β^|i−j|, the start's loss among the L_j:
    from both sides, since a mean over the past alone lags by up to β/(1−β) rates, and suggests larger ones. The test
    has diverged where L_i is not finite, or its mean over the past is above 4 × the best so far; nothing is read off
    from there on. All steps run in one compiled scan, which other rates and params do not compile again.

    Batches differ by themselves, and one that is lucky must not pass for a good rate, nor one that is not for a
    divergence. So each batch is looked at before the step that it follows too: D_i, the sum of these differences up to
    η_i, is what the steps have done, and L_i − D_i − E(ω₀) is the batches' noise, none for the full batch. The test has
    diverged only where D has risen, in its mean over the past, by 3 × the best so far too; and nothing is read off
    unless D has fallen by more than twice what that noise, up to there, leaves in S, one standard deviation.

    What is read off the curve depends on the range of rates and on noise; the theory's rates are those of the start.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      start: params, or a `TrainState` to begin from; neither is changed.
      data: a pytree of arrays with a leading axis N; reshuffled each epoch, a last batch that is smaller left out.
      make_optimizer: the maker, such as `optax.sgd`, called with the rate at each step; its state is carried along.
      learning_rates: (R,) ascending, such as ``np.geomspace(1e-4, 10, 100)``.
      batch_size: B, or None for the full batch.
      key: a `jax.random.key` for the order and for `analyse`.
      steps_per_rate: k; L_i is then the mean after each of the k steps.
      smoothing: β in [0, 1); 0 does not smooth.
      analysis: of `analyse` at this start, for this optimizer; computed here on all of the data if not given.

    Returns:
      A `RangeTest`; printed, it is a table.

    Raises:
      TypeError, ValueError: an argument does not fit the contract or is out of range; or, without ``analysis``,
        there is no positive curvature, so that no rate follows from it.

    Reference:
      Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, section 3.3; steepest, minimum/10 and
      valley after what fastai's ``lr_find`` suggests.
    """
    dataset.check_in_memory("range_test", data, "pass a sample that fits in memory")
    n = contract.num_examples(data)
    if batch_size is not None:
        batch_size = check_batch_size(batch_size, n)
    if steps_per_rate < 1:
        raise ValueError(f"steps_per_rate: expected 1 or more, got {steps_per_rate}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a number in [0, 1), got {smoothing}")
    params = start.params if isinstance(start, TrainState) else start
    contract.check(loss, params, data)
    rates = _check_rates(learning_rates, params)
    state = start if isinstance(start, TrainState) else init_state(params, make_optimizer(rates[0]))
    state = with_rate(make_optimizer, state, rates[0])
    order_key, analysis_key = jax.random.split(key)
    first, after, done = _train(loss, make_optimizer, state, rates, data, order_key, batch_size, steps_per_rate)
    diverged, smoothed, seen = _smooth(first, after, done, smoothing)
    plain = _descends_plainly(make_optimizer, params)
    if analysis is None:
        analysis = _analyse(loss, params, data, make_optimizer, batch_size, analysis_key)
    optimal, maximal = (jnp.where(plain, rate, jnp.nan) for rate in (analysis.optimal, analysis.maximal))
    same = analysis.optimizer == name_of(make_optimizer) or (plain and analysis.optimizer == "sgd")
    derived = jnp.where(same, analysis.rate(batch_size), jnp.nan)
    steepest, tenth, valley = (jnp.where(seen, rate, jnp.nan) for rate in _suggest(rates, smoothed, diverged))
    return RangeTest(
        rates, after, smoothed, first, diverged, steepest, tenth, valley, optimal, maximal, derived, batch_size
    )


def _analyse(
    loss: Loss, params: ArrayTree, data: Any, make_optimizer: MakeOptimizer, batch_size: int | None, key: Array
) -> Analysis:
    sizes = [contract.num_examples(data) if batch_size is None else batch_size]
    try:
        return analyse(loss, params, data, key=key, make_optimizer=make_optimizer, batch_sizes=sizes)
    except TypeError:
        # No rate is known for this optimizer; of gradient descent's analysis, λ_max remains.
        return analyse(loss, params, data, key=key, batch_sizes=sizes)


def _check_rates(rates: ArrayLike, params: ArrayTree) -> Array:
    dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
    with np.errstate(over="ignore", under="ignore"):
        values = np.asarray(rates, np.float64).astype(dtype)
    if values.ndim != 1 or len(values) < 2 or not (values > 0).all() or not (np.diff(values) > 0).all():
        raise ValueError(
            f"learning_rates: expected 2 or more positive numbers in ascending order, got {rates} in {dtype}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"learning_rates: expected finite numbers in {dtype}, got {rates}")
    return jnp.asarray(values)


@functools.partial(jax.jit, static_argnames=("loss", "make_optimizer", "batch_size", "steps_per_rate"))
def _train(
    loss: Loss,
    make_optimizer: MakeOptimizer,
    state: TrainState,
    rates: Array,
    data: ArrayTree,
    key: Array,
    batch_size: int | None,
    steps_per_rate: int,
) -> tuple[Array, Array, Array]:
    """The loss at the start; (R,) the mean loss after the steps at each rate, and what all steps so far did to it."""
    num_steps = rates.size * steps_per_rate
    # One batch more than steps: what a step did is seen on the next.
    batches = _batches(key, contract.num_examples(data), batch_size, num_steps + 1)
    batch_of = lambda rows: data if batch_size is None else jax.tree.map(lambda x: x[rows], data)

    def step(state: TrainState, inputs: tuple[Array, Array, Array]) -> tuple[TrainState, Any]:
        rate, rows, coming = inputs
        start = state.params
        state, metrics = make_update(loss, make_optimizer(rate))(with_rate(make_optimizer, state, rate), batch_of(rows))
        return state, (metrics["loss"], metrics["loss"] if batch_size is None else loss(start, batch_of(coming)))

    of_step = jnp.repeat(rates, steps_per_rate)
    state, (before, unmoved) = trajectory(step, state, (of_step, batches[:-1], batches[1:]))
    after = jnp.append(before[1:], loss(state.params, batch_of(batches[-1])))
    of_rate = lambda values: values.reshape(-1, steps_per_rate).mean(axis=1)
    return before[0], of_rate(after), of_rate(jnp.cumsum(after - unmoved))


def _batches(key: Array, n: int, batch_size: int | None, count: int) -> Array:
    """(count, B) indices: the whole batches of each epoch, one epoch after the other; none for the full batch."""
    if batch_size is None:
        return jnp.zeros((count, 0), jnp.int32)
    per_epoch = n // batch_size
    epochs = jnp.arange(-(-count // per_epoch))
    rows = jax.vmap(lambda epoch: reshuffled(key, epoch, n)[: per_epoch * batch_size])(epochs)
    return rows.reshape(-1, batch_size)[:count]


@jax.jit
def _smooth(first: Array, after: Array, done: Array, smoothing: Array | float) -> tuple[Array, Array, Array]:
    """The index at which the losses after the first have diverged, S up to there, and whether its fall is seen."""
    values, steps = jnp.append(first, after), jnp.append(0, done)
    index, known = jnp.arange(values.size), jnp.isfinite(values) & jnp.isfinite(steps)
    weights = smoothing ** jnp.abs(index - index[:, None])
    mean = lambda weights, values: weights @ jnp.where(known, values, 0) / weights.sum(axis=1)
    so_far, moved = (mean(jnp.tril(weights), x) for x in (values, steps))
    best = lax.cummin(so_far)
    # 4 × the best, in words that hold for a loss below 0 too.
    much = 3 * jnp.abs(best)
    bad = ~known | ((so_far > best + much) & (moved > lax.cummin(moved) + much))
    end = jnp.where(bad.any(), jnp.argmax(bad), values.size)
    good = index < end
    kept = jnp.where(good, weights, 0)
    smoothed = jnp.where(good, mean(kept, values), jnp.nan)
    left = jnp.sqrt((kept**2).sum(axis=1)) / kept.sum(axis=1)
    # As the steps go down: what they do later makes noise of its own.
    lowest = jnp.argmin(jnp.where(good, steps, jnp.inf))
    noise = left[lowest] * jnp.std(values - steps, where=index <= lowest)
    seen = -steps[lowest] > 2 * noise
    return jnp.maximum(end - 1, 0), smoothed[1:], seen


@jax.jit
def _suggest(rates: Array, smoothed: Array, diverged: Array) -> tuple[Array, Array, Array]:
    """Steepest, minimum/10 and valley of the curve before it diverged."""
    index = jnp.arange(rates.size)
    curve = jnp.where(index < diverged, smoothed, jnp.inf)
    lowest = jnp.argmin(curve)
    slope = jnp.where(index[1:] <= lowest, jnp.diff(smoothed) / jnp.diff(jnp.log(rates)), 0)
    fastest = jnp.argmin(slope)
    # A minimum at an end of the rates is the range's, not the loss's.
    inside = (lowest > 0) & (lowest < rates.size - 1)
    begin, end = _longest_descent(curve)
    return (
        jnp.where(slope[fastest] < 0, rates[fastest + 1], jnp.nan),
        jnp.where(inside, rates[lowest] / 10, jnp.nan),
        jnp.where(begin < end, jnp.sqrt(rates[begin] * rates[end]), jnp.nan),
    )


def _longest_descent(curve: Array) -> tuple[Array, Array]:
    """The ends of the longest subsequence that falls: ℓ_i = 1 + max ℓ_j over j < i with curve_j > curve_i."""
    index = jnp.arange(curve.size)

    def extend(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
        length, begin = carry
        before = jnp.where((index < i) & (curve > curve[i]), length, 0)
        j = jnp.argmax(before)
        return (length.at[i].add(before[j]), begin.at[i].set(jnp.where(before[j] > 0, begin[j], i))), None

    (length, begin), _ = lax.scan(extend, (jnp.ones_like(index), index), index)
    end = jnp.argmax(length)
    return begin[end], end


@functools.partial(jax.jit, static_argnames="make_optimizer")
def _descends_plainly(make_optimizer: MakeOptimizer, params: ArrayTree) -> Array:
    """Whether the optimizer is plain SGD: two steps on a plane ⟨c, ω⟩ end at ω₀ − 2ηc."""
    plane = jax.tree.map(lambda x: jnp.sin(1 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    optimizer = make_optimizer(1.0)
    update = make_update(lambda p, c: optax.tree.vdot(p, c), optimizer)
    state = init_state(jax.tree.map(jnp.ones_like, params), optimizer)
    for _ in range(2):
        state, _ = update(state, plane)
    return optax.tree.allclose(state.params, jax.tree.map(lambda c: 1 - 2 * c, plane), 1e-2, 1e-2)
