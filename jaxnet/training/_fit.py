"""Training from Python: one call, a history, and the word on why it ended."""

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import contract, dataset, losses, mesh
from jaxnet.contract import Array, ArrayTree, Loss, MakeOptimizer, Observer, check_batch_size
from jaxnet.data import Order, check_num_shards, reshuffled
from jaxnet.training import _program
from jaxnet.training._history import FitProgress, FitResult, best_of, carried, check_same_run, history_of, result_of
from jaxnet.training._optimizer import check_state, renewed
from jaxnet.training._program import Augment, Metric, StopRule
from jaxnet.training._update import TrainState, init_state


@contract.takes_loss
def fit(
    loss: Loss,
    start: ArrayTree | TrainState | FitProgress,
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
      start: params; or a `TrainState` at the end of an epoch to go on from, where history, ``stop`` and ``best`` begin
        anew; or a `FitProgress`, such as `restore` returns, to go on with, where they go on too. The data's order is a
        function of (key, step), so a run that goes on with the same key and batch size is the same run.
        A rate that its state keeps (`optax.inject_hyperparams`) gives way to ``learning_rate``; see `with_rate`.
      data: a pytree of arrays with a leading axis N; or a data set in batches (see `jaxnet.dataset`): a pass over it is
        an epoch, its batches are the steps, in its own order, and one that is smaller counts by its size.
      make_optimizer: the maker, such as `optax.sgd`: called with the rate, inside the compiled program.
      learning_rate: a positive number, or an optax schedule (which is compiled in).
      batch_size: 1 is stochastic, B mini-batch, None full-batch. Where B does not divide N, the epoch's last
        step sees the examples that are left. Of a data set in batches, the size of its batches, or None, which
        accumulates the gradient over a whole pass into one step.
      num_epochs: the most epochs of the run, those before a `FitProgress` to go on with among them.
      key: a `jax.random.key`, for the order and for ``augment``.
      order: `jaxnet.data.reshuffled`, `independent`, `cyclic` or one's own.
      augment: ``augment(key, batch) -> batch``, applied at each step: all that is random in a step.
      validation: held-out data, or a data set in batches; its loss is in the history, and the params of its minimum in
        ``best``.
      stop: a `StopRule`; without one the run ends after ``num_epochs``, or when it diverges.
      metrics: name -> ``metric(params, batch)``, a mean over the batch, evaluated on all of the data at the end of each
        epoch.
      observers: called with a `FitProgress` after each epoch, outside the compiled program; those that are context
        managers are entered before the first epoch, and left when the run ends, however it ends.
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
    if isinstance(observers, str) or not isinstance(observers, Sequence):
        raise TypeError(f"observers: expected a list of functions, got {type(observers).__name__}")
    for observer in observers:
        contract.check_function("observers", observer)
    run = start if isinstance(start, FitProgress) else None
    if run is not None:
        check_same_run(run, key, program.batch_size, program.num_shards, tuple(metrics or {}), validation is not None)
        start = run.state
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
    carry = _program.begin(state, validation is not None) if run is None else carried(run._replace(state=state), stop)
    with contextlib.ExitStack() as stack:
        for observer in observers:
            if isinstance(observer, contextlib.AbstractContextManager):
                stack.enter_context(observer)
        return _run(program, carry, run, rate, data, validation, key, stop, observers)


def _run(
    program: _program.Program,
    carry: _program.Carry,
    run: FitProgress | None,
    rate: Array,
    data: Any,
    validation: Any,
    key: Array,
    stop: StopRule,
    observers: Sequence[Observer],
) -> FitResult:
    """Epoch after epoch where somebody looks on, or the data are on the host; else all that are left at once."""
    first, earlier, done = carry.state, run and run.history, int(carry.epochs)
    one_by_one = bool(observers) or dataset.on_host(data, validation)
    block = dataclasses.replace(program, num_epochs=1 if one_by_one else max(1, program.num_epochs - done))
    blocks: list[_program.Rows] = []
    while int(carry.code) == _program.RUNNING and done < program.num_epochs:
        carry, rows, count = _program.compiled_run(block, carry, rate, data, validation, key, stop)
        blocks.append(jax.tree.map(lambda x, count=int(count): np.asarray(x)[:count], rows))
        done = int(carry.epochs)
        if observers:
            history = history_of(blocks, first, earlier)
            last = int(history.epoch[-1]) + program.num_epochs - done
            best, waited = best_of(carry, history), int(carry.waited)
            shown = FitProgress(
                epoch=int(history.epoch[-1]),
                num_epochs=last,
                state=carry.state,
                history=history,
                best=best,
                waited=waited,
                key=key,
                batch_size=program.batch_size,
                num_shards=program.num_shards,
            )
            for observer in observers:
                observer(shown)
    return result_of(carry, history_of(blocks, first, earlier))


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
        history = history_of([of_run], TrainState(start, None, jnp.zeros((), jnp.int32)), None)
        results.append(result_of(carry, history))
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
    if augment is not None:
        contract.check_function("augment", augment)
    if not isinstance(metrics or {}, Mapping):
        raise TypeError(f"metrics: expected names with a function for each, got {type(metrics).__name__}")
    for name, metric in (metrics or {}).items():
        contract.check_function(f"metrics, {name}", metric)
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
    if isinstance(rates, str):
        raise TypeError(f"learning_rate: expected a number, got {rates!r}")
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
    if stop is not None and not isinstance(stop, StopRule):
        raise TypeError(f"stop: expected a StopRule, got {type(stop).__name__}")
    stop = stop or StopRule()
    if stop.patience < 1 or math.isnan(stop.loss_below):
        raise ValueError(f"stop: expected a patience from 1 on and a loss that is a number, got {stop}")
    if stop.patience != StopRule().patience and validation is None:
        raise ValueError("stop: patience watches the validation loss; pass validation data")
    return stop
