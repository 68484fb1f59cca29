"""Training from Python: one call, a history, and the word on why it ended."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import contract, dataset, losses, mesh
from jaxnet.contract import Array, ArrayTree, Loss, MakeOptimizer, Observer, check_batch_size
from jaxnet.data import Order, check_num_shards, reshuffled
from jaxnet.training import _program
from jaxnet.training._optimizer import check_state, renewed
from jaxnet.training._program import Augment, Metric, StopRule
from jaxnet.training._update import TrainState, init_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What was seen along a run, one entry an epoch unless said otherwise; after `sweep`, a leading axis of runs.

    Attributes:
      epoch: (E,) epochs done, counted from 1.
      step: (E,) iterations done at the end of each epoch.
      loss: (E,) mean over the epoch's steps of the loss before each step, weighted by batch sizes.
      step_loss: (E, S) those losses, one an iteration; NaN where a pass over a stream had fewer batches than another.
      metrics: name -> (E,), each metric on the training data at the end of the epoch.
      validation: name -> (E,), "loss" and each metric on the validation data; empty without it.
    """

    epoch: Array
    step: Array
    loss: Array
    step_loss: Array
    metrics: dict[str, Array]
    validation: dict[str, Array]


class Stopped(NamedTuple):
    """Why and where a run ended.

    Attributes:
      reason: "num_epochs", "loss_below", "patience" or "diverged".
      epoch: epochs done.
      step: iterations done; of a run that diverged, the first step (from 1) whose loss before it, or params after
        it, were not finite.
    """

    reason: str
    epoch: int
    step: int

    def __str__(self) -> str:
        """The reason in words."""
        return {
            "num_epochs": f"ran all its epochs, to step {self.step}",
            "loss_below": f"the loss was small enough after epoch {self.epoch}, step {self.step}",
            "patience": f"the validation loss had stopped improving by epoch {self.epoch}, step {self.step}",
            "diverged": f"diverged: loss or params were not finite at step {self.step}, in epoch {self.epoch}",
        }[self.reason]


class Best(NamedTuple):
    """The parameters with the lowest validation loss, the epoch after which they were seen, and that loss."""

    params: Any
    epoch: int
    loss: float


class FitResult(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: the `TrainState` at the end.
      history: a `History`.
      stopped: a `Stopped`, why the run ended.
      best: a `Best` by validation loss, or None without validation data.
    """

    state: TrainState
    history: History
    stopped: Stopped
    best: Best | None


class FitProgress(NamedTuple):
    """What an observer is shown after each epoch: epochs done in this call and asked for, state and history so far."""

    epoch: int
    num_epochs: int
    state: TrainState
    history: History


@contract.takes_loss
def fit(
    loss: Loss,
    start: ArrayTree | TrainState,
    data: Any,
    make_optimizer: MakeOptimizer,
    *,
    learning_rate: Any,
    batch_size: int | None,
    num_epochs: int,
    key: Array,
    order: Order = reshuffled,
    augment: Augment | None = None,
    validation: Any = None,
    stop: StopRule | None = None,
    metrics: Mapping[str, Metric] | None = None,
    observers: Sequence[Observer] = (),
    num_shards: int = 1,
) -> FitResult:
    """Minimise ``loss`` over ``data`` by mini-batch steps; one rule, three batch sizes.

    The steps of an epoch are one `lax.scan`, and all epochs one compiled program, which another rate, key or
    data of the same shape does not compile again.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over the batch.
      start: params, or a `TrainState` at the end of an epoch to go on from. The data's order is a function of (key,
        step), so a run that goes on with the same key and batch size is the same run; ``stop`` and ``best`` begin anew.
        A rate that its state keeps (`optax.inject_hyperparams`) gives way to ``learning_rate``; see `with_rate`.
      data: a pytree of arrays with a leading axis N; or a data set in batches (see `jaxnet.dataset`): a pass over it is
        an epoch, its batches are the steps, in its own order, and one that is smaller counts by its size.
      make_optimizer: the maker, such as `optax.sgd`: called with the rate, inside the compiled program.
      learning_rate: a positive number, or an optax schedule (which is compiled in).
      batch_size: 1 is stochastic, B mini-batch, None full-batch. Where B does not divide N, the epoch's last
        step sees the examples that are left. Of a data set in batches, the size of its batches, or None, which
        accumulates the gradient over a whole pass into one step.
      num_epochs: the most epochs to run in this call.
      key: a `jax.random.key`, for the order and for ``augment``.
      order: `jaxnet.data.reshuffled`, `independent`, `cyclic` or one's own.
      augment: ``augment(key, batch) -> batch``, applied at each step: all that is random in a step.
      validation: held-out data, or a data set in batches; its loss is in the history, and the params of its minimum in
        ``best``.
      stop: a `StopRule`; without one the run ends after ``num_epochs``, or when it diverges.
      metrics: name -> ``metric(params, batch)``, a mean over the batch, evaluated on all of the data at the end of each
        epoch.
      observers: called with a `FitProgress` after each epoch, outside the compiled program.
      num_shards: S, a divisor of N and B: of S parts of the data that lie together, each is put in an order of its own,
        and each step takes B/S examples of each. So many devices, or a divisor of their number, need not send one
        another examples; the run is the same on any number of them.

    Returns:
      A `FitResult`. A run whose loss is not finite ends with that epoch, and says so in ``stopped``.

    Raises:
      TypeError, ValueError: an argument does not fit the contract, or is out of range.

    Reference:
      LeCun et al., "Efficient BackProp", 1998, sections 4.1 and 4.2.
    """
    data, validation = dataset.of(data), dataset.of(validation)
    program = _make_program(
        loss, data, make_optimizer, learning_rate, batch_size, num_epochs, order, augment, metrics, num_shards
    )
    stop = _check_stop(stop, validation)
    if isinstance(start, TrainState):
        contract.check_params(start.params)
        state = start
    else:
        state = init_state(start, make_optimizer(learning_rate))
    _check_resumed(state, program, data)
    _check_data(loss, state.params, data, validation, augment)
    rate = jnp.zeros(()) if program.schedule else _check_rates(learning_rate, state.params)
    if jnp.ndim(rate):
        raise ValueError(f"learning_rate: expected one number, got shape {jnp.shape(rate)}; see sweep for several")
    if isinstance(start, TrainState) and not program.schedule:
        state = state._replace(opt_state=renewed(make_optimizer, state.opt_state, state.params, rate))
    # What looks on between epochs, or brings the data, is on the host.
    one_by_one = bool(observers) or dataset.on_host(data, validation)
    block = dataclasses.replace(program, num_epochs=1) if one_by_one else program
    carry = _program.begin(state, validation is not None)
    blocks: list[_program.Rows] = []
    for epoch in range(1, num_epochs + 1, block.num_epochs):
        carry, rows, done = _program.compiled_run(block, carry, rate, data, validation, key, stop)
        blocks.append(jax.tree.map(lambda x, done=int(done): np.asarray(x)[:done], rows))
        if observers:
            shown = FitProgress(epoch, num_epochs, carry.state, _history(blocks, state))
            for observer in observers:
                observer(shown)
        if int(carry.code) != _program.RUNNING:
            break
    return _result(carry, _history(blocks, state), validation is not None)


def _result(carry: _program.Carry, history: History, has_validation: bool) -> FitResult:
    best = None
    if has_validation:
        before = int(history.epoch[0]) - 1
        best = Best(carry.best_params, before + int(carry.best_epoch), float(carry.best_loss))
    return FitResult(carry.state, history, _stopped(int(carry.code), history), best)


@contract.takes_loss
def sweep(
    loss: Loss,
    start: ArrayTree,
    data: ArrayTree,
    make_optimizer: MakeOptimizer,
    *,
    learning_rates: Any,
    batch_size: int | None,
    num_epochs: int,
    key: Array | None = None,
    keys: Array | None = None,
    order: Order = reshuffled,
    augment: Augment | None = None,
    validation: ArrayTree | None = None,
    stop: StopRule | None = None,
    metrics: Mapping[str, Metric] | None = None,
    num_shards: int = 1,
) -> list[FitResult]:
    """`fit` from the same params at R learning rates, in one compiled, vmapped program.

    Args:
      loss: as in `fit`, and so are all arguments not named here.
      start: params.
      data: a pytree of arrays with a leading axis N.
      make_optimizer: the maker, called with each rate.
      learning_rates: (R,) positive numbers.
      batch_size: 1, B or None.
      num_epochs: the most epochs of each run.
      key: one key for all runs, so that they see the same batches, or
      keys: (R,) keys, one a run.
      order: which examples each step sees.
      augment: what is random in a step.
      validation: held-out data.
      stop: a `StopRule`, for each run by itself.
      metrics: name -> ``metric(params, batch)``.
      num_shards: as in `fit`.

    Returns:
      R results, as `fit` returns them.

    Raises:
      TypeError, ValueError: as `fit`; or not exactly one of ``key`` and ``keys`` is given.
    """
    if (key is None) == (keys is None):
        raise ValueError("sweep: expected either key, one for all runs, or keys, one a run")
    if isinstance(start, TrainState):
        raise TypeError("start: expected params, got a TrainState; sweep begins with a fresh optimizer at each rate")
    contract.check_params(start)
    start = jax.tree.map(jnp.asarray, start)
    rates = _check_rates(learning_rates, start)
    if rates.ndim != 1 or (keys is not None and keys.shape[:1] != rates.shape):
        raise ValueError(f"learning_rates: expected one axis, as long as keys where given, got {rates.shape}")
    for held in (data, validation):
        dataset.check_in_memory("sweep", held, "use fit for one rate after the other, or pass a sample")
    program = _make_program(
        loss, data, make_optimizer, rates[0], batch_size, num_epochs, order, augment, metrics, num_shards
    )
    _check_data(loss, start, data, validation, augment)
    stop = _check_stop(stop, validation)
    key_or_keys = key if keys is None else keys
    carries, rows, done = _program.compiled_sweep(
        program, start, rates, data, validation, key_or_keys, stop, keys is not None
    )
    rows, done = jax.tree.map(np.asarray, (rows, done))
    results = []
    for run, count in enumerate(done):
        carry = jax.tree.map(lambda x, run=run: x[run], carries)
        of_run = jax.tree.map(lambda x, run=run, count=count: x[run][:count], rows)
        history = _history([of_run], TrainState(start, None, jnp.zeros((), jnp.int32)))
        results.append(_result(carry, history, validation is not None))
    return results


def _make_program(
    loss: Loss,
    data: Any,
    make_optimizer: MakeOptimizer,
    learning_rate: Any,
    batch_size: int | None,
    num_epochs: int,
    order: Order,
    augment: Augment | None,
    metrics: Mapping[str, Metric] | None,
    num_shards: int,
) -> _program.Program:
    streamed = dataset.on_host(data)
    if streamed and order is not reshuffled:
        raise ValueError("order: a data set in batches comes in an order of its own; shuffle where it is made")
    n = 2**31 - 1 if streamed else contract.num_examples(data)
    if batch_size is not None:
        batch_size = check_batch_size(batch_size, n)
    if not isinstance(num_epochs, numbers.Integral) or num_epochs < 1:
        raise ValueError(f"num_epochs: expected a whole number from 1 on, got {num_epochs}")
    if not callable(make_optimizer):
        raise TypeError(
            "make_optimizer: expected a maker such as optax.sgd, to be called with the learning rate, got "
            f"{type(make_optimizer).__name__}; pass optax.sgd, not optax.sgd(0.1)"
        )
    if streamed and num_shards != 1:
        raise ValueError("num_shards: a data set in batches comes in an order of its own; shard where it is made")
    num_shards = check_num_shards(num_shards, n, batch_size)
    schedule = learning_rate if callable(learning_rate) else None
    return _program.Program(
        loss,
        make_optimizer,
        schedule,
        batch_size,
        num_epochs,
        order,
        augment,
        tuple((metrics or {}).items()),
        num_shards,
    )


def _check_data(loss: Loss, params: ArrayTree, data: Any, validation: Any, augment: Augment | None) -> None:
    """Raise where arrays lie on different devices, or labels have no loss: a run would only be told to diverge."""
    mesh.check_together(start=params, data=data, validation=validation)
    # What an augmentation makes of the data is not at hand.
    for name, held in (("data", None if augment else data), ("validation", validation)):
        if held is not None and not dataset.on_host(held):
            losses.check_labels(loss, params, held, name)


def _check_rates(rates: Any, params: ArrayTree) -> Array:
    if callable(rates):
        raise TypeError("learning_rates: expected numbers, got a function; a schedule is for fit")
    # One dtype for every kind of number, so that a Python float and a computed rate share a compilation.
    dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
    with np.errstate(over="ignore", under="ignore"):
        values = np.asarray(rates, dtype=np.float64).astype(dtype)
    if not (values.size and np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"learning_rate: expected positive and finite in {dtype}, got {rates}")
    return jnp.asarray(values)


def _check_resumed(state: TrainState, program: _program.Program, data: Any) -> None:
    check_state(program.make_optimizer, program.schedule or 1.0, state.opt_state, state.params)
    steps = 1 if dataset.on_host(data) else program.steps_per_epoch(contract.num_examples(data))
    if int(state.step) % steps:
        raise ValueError(
            f"start: its step {int(state.step)} is not at the end of an epoch of {steps} steps; go on with the batch "
            "size that it was made with, or from start.params"
        )


def _check_stop(stop: StopRule | None, validation: ArrayTree | None) -> StopRule:
    stop = stop or StopRule()
    if stop.patience < 1 or math.isnan(stop.loss_below):
        raise ValueError(f"stop: expected a patience from 1 on and a loss that is a number, got {stop}")
    if stop.patience != StopRule().patience and validation is None:
        raise ValueError("stop: patience watches the validation loss; pass validation data")
    return stop


def _history(blocks: list[_program.Rows], start: TrainState) -> History:
    steps = np.concatenate([np.full(block.step_loss.shape[0], block.step_loss.shape[1]) for block in blocks])
    longest = int(steps.max())
    # A stream may have more batches in one pass than in another.
    padded = [block._replace(step_loss=_padded(block.step_loss, longest)) for block in blocks]
    rows = jax.tree.map(lambda *parts: np.concatenate(parts), *padded)
    epoch: Any = int(start.step) // int(steps[0]) + np.arange(1, len(steps) + 1)
    step: Any = int(start.step) + np.cumsum(steps)
    return History(epoch, step, rows.loss, rows.step_loss, rows.metrics, rows.validation)


def _padded(step_loss: Any, length: int) -> Any:
    missing = length - step_loss.shape[1]
    return np.pad(step_loss, ((0, 0), (0, missing)), constant_values=np.nan) if missing else step_loss


def _stopped(code: int, history: History) -> Stopped:
    reason = _program.REASONS[code or _program.NUM_EPOCHS]
    epoch, step = int(history.epoch[-1]), int(history.step[-1])
    if reason == "diverged":
        steps = step - int(history.step[-2]) if len(history.step) > 1 else history.step_loss.shape[1]
        bad = ~np.isfinite(history.step_loss[-1][:steps])
        # Where every loss was finite, the params stopped being so after the last step.
        step += 1 - steps + int(np.argmax(bad)) if bad.any() else 0
    return Stopped(reason, epoch, step)
