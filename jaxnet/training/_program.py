"""The compiled part of `fit`: epochs as scans over steps, inside one loop over epochs."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, MakeOptimizer
from jaxnet.data import Order, in_shards, rows_in_shards
from jaxnet.training._trajectory import trajectory
from jaxnet.training._update import TrainState, apply_gradient, make_update

Augment: TypeAlias = Callable[[Array, Any], Any]
Metric: TypeAlias = Callable[[Any, Any], Array]

# Why a run ended; the position is the code that the compiled loop carries.
REASONS = ("running", "num_epochs", "loss_below", "patience", "diverged")
RUNNING, NUM_EPOCHS, LOSS_BELOW, PATIENCE, DIVERGED = range(5)


class StopRule(NamedTuple):
    """When to end before ``num_epochs``.

    Attributes:
      loss_below: end after the first epoch whose training loss is below this: the error is small enough.
      patience: end when the validation loss has not improved for this many epochs: early stopping.
    """

    loss_below: float = -math.inf
    patience: int = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled run is specialised to; two runs with equal programs and shapes share one compilation."""

    loss: Loss
    make_optimizer: MakeOptimizer
    schedule: Callable[[Array], Array] | None
    batch_size: int | None
    num_epochs: int
    order: Order
    augment: Augment | None
    metrics: tuple[tuple[str, Metric], ...]
    num_shards: int = 1

    def steps_per_epoch(self, n: int) -> int:
        """⌈N/B⌉: a last batch that is smaller than B is a step too."""
        return 1 if self.batch_size is None else -(-n // self.batch_size)


class Carry(NamedTuple):
    """What a run carries from epoch to epoch besides its history."""

    state: TrainState
    best_params: Any
    best_epoch: Array
    best_loss: Array
    waited: Array
    code: Array
    epochs: Array


class Rows(NamedTuple):
    """History buffers, one row an epoch of this call."""

    loss: Array
    step_loss: Array
    metrics: dict[str, Array]
    validation: dict[str, Array]


def begin(state: TrainState, has_validation: bool) -> Carry:
    """What is carried before the first epoch."""
    dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(state.params)), jnp.float32)
    return Carry(
        state=state,
        best_params=state.params if has_validation else None,
        best_epoch=jnp.zeros((), jnp.int32),
        best_loss=jnp.array(jnp.inf, dtype),
        waited=jnp.zeros((), jnp.int32),
        code=jnp.array(RUNNING, jnp.int32),
        epochs=jnp.zeros((), jnp.int32),
    )


def code_of(loss: Array, waited: Array, finite: Array, stop: StopRule) -> Array:
    """Why the run ends with an epoch, or that it goes on."""
    code = jnp.where(waited >= stop.patience, PATIENCE, RUNNING)
    code = jnp.where(loss < stop.loss_below, LOSS_BELOW, code)
    return jnp.where(finite, code, DIVERGED).astype(jnp.int32)


def _update(program: Program, rate: Array, key: Array, state: TrainState, batch: ArrayTree) -> tuple[TrainState, Any]:
    """One step, whatever is random in it by a key of its own."""
    if program.augment is not None:
        batch = program.augment(_augment_key(key, state.step), batch)
    return make_update(program.loss, program.make_optimizer(program.schedule or rate))(state, batch)


def _augment_key(key: Array, step: Array) -> Array:
    # The order folds epochs into the key; no run gets as far as this number.
    return jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), step)


def _epoch(program: Program, state: TrainState, rate: Array, data: Any, key: Array) -> tuple[TrainState, Array, Array]:
    """One epoch; returns the state, the loss before each of its steps, and how many examples each step saw."""
    if dataset.on_host(data):
        return _epoch_of_stream(program, state, rate, data, key)
    n = contract.num_examples(data)
    update = functools.partial(_update, program, rate, key)
    if program.batch_size is None:
        state, metrics = trajectory(update, state, data, num_steps=1)
        return state, metrics["loss"], jnp.array([n])
    size, steps, shards = program.batch_size, program.steps_per_epoch(n), program.num_shards
    step = lambda state, rows: update(state, rows_in_shards(data, rows))
    indices = in_shards(program.order, key, state.step // steps, n, shards)
    own, whole = size // shards, n // size
    in_steps = indices[:, : whole * own].reshape(shards, whole, own).swapaxes(0, 1)
    # Two steps an iteration: a step of one example costs little more than the loop around it.
    state, metrics = trajectory(step, state, in_steps, unroll=2)
    losses = metrics["loss"]
    if whole < steps:
        state, metrics = step(state, indices[:, whole * own :])
        losses = jnp.append(losses, metrics["loss"])
    return state, losses, jnp.full(steps, size).at[-1].set(n - (steps - 1) * size)


def _epoch_of_stream(
    program: Program, state: TrainState, rate: Array, data: Any, key: Array
) -> tuple[TrainState, Array, Array]:
    """The same where the batches, in the stream's own order, are the steps, or all of them one."""
    size = program.batch_size
    if size is None:
        value_and_grad = _AugmentedGradient(contract.ValueAndGrad(program.loss), program.augment)
        batches = dataset.Stream(_Numbered(data))
        value, grad = dataset.mean(value_and_grad, batches, state.params, _augment_key(key, state.step))
        state, metrics = _accumulated_step(program, rate, state, value, grad)
        return state, metrics["loss"][None], jnp.ones(1)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        n = contract.num_examples(batch)
        if n > size:
            raise ValueError(f"batch_size: expected that of the batches, of which one holds {n} examples, got {size}")
        state, metrics = _streamed_step(program, rate, key, state, batch)
        return state, (metrics["loss"], jnp.array(n))

    state, (losses, sizes) = trajectory(step, state, data)
    return state, losses, sizes


_streamed_step = jax.jit(_update, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _accumulated_step(program: Program, rate: Array, state: TrainState, value: Array, grad: ArrayTree) -> Any:
    optimizer = program.make_optimizer(program.schedule or rate)
    return apply_gradient(optimizer, state, value, grad, _no_value_fn)


def _no_value_fn(params: ArrayTree) -> Array:
    raise TypeError(
        "batch_size: an optimizer that evaluates the loss itself needs a batch at hand, not a pass over a data set in "
        "batches; train on the batches by their size, or pass one batch in memory"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Numbered:
    """Batches beside their numbers, one an example, from which each draws its randomness."""

    batches: Any

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            yield np.full(contract.num_examples(batch), number), batch


@dataclasses.dataclass(frozen=True)
class _AugmentedGradient:
    value_and_grad: contract.ValueAndGrad
    augment: Augment | None

    def __call__(self, numbered: Any, params: ArrayTree, key: Array) -> Any:
        numbers, batch = numbered
        if self.augment is not None:
            batch = self.augment(jax.random.fold_in(key, numbers[0]), batch)
        return self.value_and_grad(batch, params)


@dataclasses.dataclass(frozen=True)
class _Metrics:
    """name -> ``metric(params, batch)``, each a mean over the batch."""

    metrics: tuple[tuple[str, Metric], ...]

    def __call__(self, batch: Any, params: ArrayTree) -> dict[str, Array]:
        return {name: metric(params, batch) for name, metric in self.metrics}


def _epochs(
    program: Program,
    carry: Carry,
    rate: Array,
    data: Any,
    validation: Any,
    key: Array,
    stop: StopRule,
) -> tuple[Carry, Rows, Array]:
    """Up to ``program.num_epochs`` epochs; returns what is carried, the history and the number of epochs done.

    Where the data or the validation are in batches, one epoch.
    """
    if not dataset.on_host(data):
        augmented = program.augment(key, data) if program.augment else data
        contract.check(program.loss, carry.state.params, augmented)
    _check_whole_batch(program, carry.state.opt_state, data)

    def one_epoch(carry: Carry) -> tuple[Carry, Rows]:
        # Where the validation alone is on the host, the epoch is a program of its own.
        epoch = _compiled_epoch if dataset.on_host(validation) else _epoch
        state, losses, sizes = epoch(program, carry.state, rate, data, key)
        # Each step's share of the epoch's examples, in a precision that sums thousands of losses.
        shares = sizes.astype(carry.best_loss.dtype) / sizes.sum()
        loss = jnp.vdot(shares, losses.astype(shares.dtype))
        carry = carry._replace(state=state, epochs=carry.epochs + 1)
        held_out = {}
        if validation is not None:
            metrics = _Metrics((*program.metrics, ("loss", program.loss)))
            held_out = dataset.mean(metrics, validation, state.params)
            carry = _keep_best(carry, held_out["loss"])
        finite = jnp.stack([jnp.isfinite(x).all() for x in (losses, *jax.tree.leaves(state.params))])
        code = code_of(loss, carry.waited, finite.all(), stop)
        on_data = dataset.mean(_Metrics(program.metrics), dataset.afresh(data), state.params) if program.metrics else {}
        return carry._replace(code=code), Rows(loss, losses, on_data, held_out)

    if dataset.on_host(data, validation):
        carry, row = one_epoch(carry)
        return carry, jax.tree.map(lambda x: x[None], row), jnp.ones((), jnp.int32)

    def body(loop: tuple[Array, Carry, Rows]) -> tuple[Array, Carry, Rows]:
        done, carry, rows = loop
        carry, row = one_epoch(carry)
        return done + 1, carry, jax.tree.map(lambda buffer, x: buffer.at[done].set(x), rows, row)

    shapes = jax.eval_shape(one_epoch, carry)[1]
    rows = jax.tree.map(lambda s: jnp.full((program.num_epochs, *s.shape), jnp.nan, s.dtype), shapes)
    done, carry, rows = lax.while_loop(
        lambda loop: (loop[0] < program.num_epochs) & (loop[1].code == RUNNING),
        body,
        (jnp.zeros((), jnp.int32), carry, rows),
    )
    return carry, rows, done


def _check_whole_batch(program: Program, opt_state: Any, data: Any) -> None:
    """Refuse mini-batches to an optimizer whose state says that it needs all examples in each step."""
    says = lambda node: hasattr(node, "whole_batch")
    needed = any(map(says, jax.tree.leaves(opt_state, is_leaf=says)))
    size = program.batch_size
    if needed and size is not None and (dataset.on_host(data) or size < contract.num_examples(data)):
        raise ValueError(
            f"batch_size: this optimizer follows the curvature of the batch it is given, which a mini-batch's noise "
            f"raises, and B = {size} is less than all examples; pass None, or train at the rate that "
            "jaxnet.learning_rate.analyse derives for this batch size"
        )


_compiled_epoch = dataset.jit(_epoch, static_argnames="program")


def _keep_best(carry: Carry, loss: Array) -> Carry:
    better = loss < carry.best_loss
    choose = lambda new, old: jnp.where(better, new, old)
    return carry._replace(
        best_params=jax.tree.map(choose, carry.state.params, carry.best_params),
        best_epoch=choose(carry.epochs, carry.best_epoch),
        best_loss=choose(loss.astype(carry.best_loss.dtype), carry.best_loss),
        waited=choose(0, carry.waited + 1),
    )


compiled_run = dataset.jit(_epochs, static_argnames="program")


@functools.partial(dataset.jit, static_argnames=("program", "many_keys"))
def compiled_sweep(
    program: Program,
    start: ArrayTree,
    rates: Array,
    data: ArrayTree,
    validation: ArrayTree | None,
    keys: Array,
    stop: StopRule,
    many_keys: bool,
) -> tuple[Carry, Rows, Array]:
    """The same for every rate (and key) at once."""

    def one(rate: Array, key: Array) -> tuple[Carry, Rows, Array]:
        optimizer = program.make_optimizer(rate)
        state = TrainState(start, optimizer.init(start), jnp.zeros((), jnp.int32))
        return _epochs(program, begin(state, validation is not None), rate, data, validation, key, stop)

    return jax.vmap(one, in_axes=(0, 0 if many_keys else None))(rates, keys)
