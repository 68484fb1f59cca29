"""The compiled part of `fit`: epochs as scans over steps, inside one loop over epochs."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.data import Order
from jaxnet.training._update import TrainState, make_update

MakeOptimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]
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
class Plan:
    """What a compiled run is specialised to; two runs with equal plans and shapes share one compilation."""

    loss: Loss
    make_optimizer: MakeOptimizer
    schedule: Callable[[Array], Array] | None
    batch_size: int | None
    num_epochs: int
    order: Order
    augment: Augment | None
    metrics: tuple[tuple[str, Metric], ...]

    def steps_per_epoch(self, n: int) -> int:
        """⌈N/B⌉: a last batch that is smaller than B is a step too."""
        return 1 if self.batch_size is None else -(-n // self.batch_size)


class Progress(NamedTuple):
    """What a run carries from epoch to epoch besides its history."""

    state: TrainState
    best_params: Any
    best_epoch: Array
    best_loss: Array
    waited: Array
    code: Array


class Rows(NamedTuple):
    """History buffers, one row an epoch of this call."""

    loss: Array
    step_loss: Array
    metrics: dict[str, Array]
    validation: dict[str, Array]


def begin(state: TrainState, has_validation: bool) -> Progress:
    """The progress before the first epoch."""
    dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(state.params)), jnp.float32)
    return Progress(
        state=state,
        best_params=state.params if has_validation else None,
        best_epoch=jnp.zeros((), jnp.int32),
        best_loss=jnp.array(jnp.inf, dtype),
        waited=jnp.zeros((), jnp.int32),
        code=jnp.array(RUNNING, jnp.int32),
    )


def _epoch(
    plan: Plan, state: TrainState, rate: Array, data: ArrayTree, key: Array, epoch: Array
) -> tuple[TrainState, Array]:
    """One epoch; returns the state and the loss before each of its steps."""
    n = contract.num_examples(data)
    size = n if plan.batch_size is None else plan.batch_size
    update = make_update(plan.loss, plan.make_optimizer(plan.schedule or rate))
    # The order folds epochs into the key; no run gets as far as this number.
    augment_key = jax.random.fold_in(key, 2**31 - 1)

    def step(state: TrainState, rows: Array | None) -> tuple[TrainState, Array]:
        batch = data if rows is None else jax.tree.map(lambda x: x[rows], data)
        if plan.augment is not None:
            batch = plan.augment(jax.random.fold_in(augment_key, state.step), batch)
        state, metrics = update(state, batch)
        return state, metrics["loss"]

    if plan.batch_size is None:
        state, loss = step(state, None)
        return state, loss[None]
    indices = plan.order(key, epoch, n)
    whole = n // size
    # Two steps an iteration: a step of one example costs little more than the loop around it.
    state, losses = lax.scan(step, state, indices[: whole * size].reshape(whole, size), unroll=2)
    if whole * size < n:
        state, last = step(state, indices[whole * size :])
        losses = jnp.append(losses, last)
    return state, losses


def _evaluate(plan: Plan, params: ArrayTree, data: ArrayTree) -> dict[str, Array]:
    return {name: metric(params, data) for name, metric in plan.metrics}


def run(
    plan: Plan,
    progress: Progress,
    rate: Array,
    data: ArrayTree,
    validation: ArrayTree | None,
    key: Array,
    stop: StopRule,
) -> tuple[Progress, Rows, Array]:
    """Up to ``plan.num_epochs`` epochs; returns the progress, the history and the number of epochs done."""
    contract.check(plan.loss, progress.state.params, plan.augment(key, data) if plan.augment else data)
    n = contract.num_examples(data)
    steps = plan.steps_per_epoch(n)
    size = n if plan.batch_size is None else plan.batch_size
    # Each step's share of the epoch's examples, in a precision that sums thousands of losses.
    shares = jnp.full(steps, size / n, progress.best_loss.dtype).at[-1].set((n - (steps - 1) * size) / n)

    def one_epoch(progress: Progress) -> tuple[Progress, Rows]:
        state, losses = _epoch(plan, progress.state, rate, data, key, progress.state.step // steps)
        loss = jnp.vdot(shares, losses.astype(shares.dtype))
        progress = progress._replace(state=state)
        code = jnp.where(loss < stop.loss_below, LOSS_BELOW, RUNNING)
        held_out = {}
        if validation is not None:
            held_out = {**_evaluate(plan, state.params, validation), "loss": plan.loss(state.params, validation)}
            progress = _keep_best(progress, held_out["loss"], state.step // steps)
            code = jnp.where((code == RUNNING) & (progress.waited >= stop.patience), PATIENCE, code)
        finite = [jnp.isfinite(x).all() for x in (losses, *jax.tree.leaves(state.params))]
        code = jnp.where(jnp.stack(finite).all(), code, DIVERGED).astype(jnp.int32)
        return progress._replace(code=code), Rows(loss, losses, _evaluate(plan, state.params, data), held_out)

    def body(carry: tuple[Array, Progress, Rows]) -> tuple[Array, Progress, Rows]:
        done, progress, rows = carry
        progress, row = one_epoch(progress)
        return done + 1, progress, jax.tree.map(lambda buffer, x: buffer.at[done].set(x), rows, row)

    shapes = jax.eval_shape(one_epoch, progress)[1]
    rows = jax.tree.map(lambda s: jnp.full((plan.num_epochs, *s.shape), jnp.nan, s.dtype), shapes)
    done, progress, rows = lax.while_loop(
        lambda carry: (carry[0] < plan.num_epochs) & (carry[1].code == RUNNING),
        body,
        (jnp.zeros((), jnp.int32), progress, rows),
    )
    return progress, rows, done


def _keep_best(progress: Progress, loss: Array, epoch: Array) -> Progress:
    better = loss < progress.best_loss
    choose = lambda new, old: jnp.where(better, new, old)
    return progress._replace(
        best_params=jax.tree.map(choose, progress.state.params, progress.best_params),
        best_epoch=choose(epoch, progress.best_epoch),
        best_loss=choose(loss.astype(progress.best_loss.dtype), progress.best_loss),
        waited=choose(0, progress.waited + 1),
    )


compiled_run = jax.jit(run, static_argnames=("plan",))


@functools.partial(jax.jit, static_argnames=("plan", "many_keys"))
def compiled_sweep(
    plan: Plan,
    start: ArrayTree,
    rates: Array,
    data: ArrayTree,
    validation: ArrayTree | None,
    keys: Array,
    stop: StopRule,
    many_keys: bool,
) -> tuple[Progress, Rows, Array]:
    """`run` for every rate (and key) at once."""

    def one(rate: Array, key: Array) -> tuple[Progress, Rows, Array]:
        optimizer = plan.make_optimizer(rate)
        state = TrainState(start, optimizer.init(start), jnp.zeros((), jnp.int32))
        return run(plan, begin(state, validation is not None), rate, data, validation, key, stop)

    return jax.vmap(one, in_axes=(0, 0 if many_keys else None))(rates, keys)
