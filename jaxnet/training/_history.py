"""What is known of a run: its history, its best, why it ended, and all that it takes to go on with it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import contract
from jaxnet.contract import Array
from jaxnet.training import _program
from jaxnet.training._program import StopRule
from jaxnet.training._update import TrainState


@contract.result
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


@contract.result
class Best(NamedTuple):
    """The parameters with the lowest validation loss, the epoch after which they were seen, and that loss."""

    params: Any
    epoch: int
    loss: float


@contract.result
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


@contract.result
class FitProgress(NamedTuple):
    """A run at the end of one of its epochs: what an observer is shown, and what `fit` goes on from.

    Attributes:
      epoch: epochs done, as `History.epoch` counts them.
      num_epochs: epochs done at the end of the run, unless it ends before.
      state: the `TrainState`; its step is the position in the data's order, which is a function of (key, step).
      history: the `History` so far.
      best: a `Best` so far, or None without validation data.
      waited: epochs since the best one, which a `StopRule` counts.
      key: of the run.
      batch_size: of the run.
      num_shards: of the run: its data's order is a function of this too.
    """

    epoch: int
    num_epochs: int
    state: TrainState
    history: History
    best: Best | None
    waited: int
    key: Array
    batch_size: int | None
    num_shards: int = 1


def carried(run: FitProgress, stop: StopRule) -> _program.Carry:
    """What `fit` carries at the point that ``run`` has reached."""
    history, carry = run.history, _program.begin(run.state, run.best is not None)
    if run.best is not None:
        carry = carry._replace(
            best_params=run.best.params,
            best_epoch=jnp.array(run.best.epoch - _before(history), jnp.int32),
            best_loss=jnp.array(run.best.loss, carry.best_loss.dtype),
            waited=jnp.array(run.waited, jnp.int32),
        )
    finite = bool(np.isfinite(history.loss[-1])) and not contract.not_finite(params=run.state.params)
    code = _program.code_of(history.loss[-1], carry.waited, jnp.array(finite), stop)
    return carry._replace(code=code, epochs=jnp.array(len(history.epoch), jnp.int32))


def check_same_run(
    run: FitProgress,
    key: Array,
    batch_size: int | None,
    num_shards: int,
    names: tuple[str, ...],
    has_validation: bool,
) -> None:
    """Raise unless `fit` was asked for the run that it is to go on with.

    Raises:
      UserError: key, batch size, number of shards, metrics or validation are others.
    """
    remedy = "; go on with the same, or begin another run from start.state"
    data_of = lambda key: np.asarray(
        jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    )
    asked: dict[str, tuple[Any, Any]] = {
        "batch_size": (run.batch_size, batch_size),
        "num_shards": (run.num_shards, num_shards),
        "key": (data_of(run.key).tolist(), data_of(key).tolist()),
        "metrics": (sorted(run.history.metrics), sorted(names)),
        "validation": (run.best is not None, has_validation),
    }
    for name, (expected, came) in asked.items():
        if expected != came:
            raise contract.UserError(f"{name}: the run to go on with has {expected}, got {came}{remedy}")


def best_of(carry: _program.Carry, history: History) -> Best | None:
    """The best params that a run carries."""
    if carry.best_params is None:
        return None
    return Best(carry.best_params, _before(history) + int(carry.best_epoch), float(carry.best_loss))


def _before(history: History) -> int:
    return int(history.epoch[0]) - 1


def result_of(carry: _program.Carry, history: History) -> FitResult:
    """What a run that has ended returns."""
    return FitResult(carry.state, history, _stopped(int(carry.code), history), best_of(carry, history))


def history_of(blocks: list[_program.Rows], start: TrainState, earlier: History | None) -> History:
    """The rows of a run that began at ``start``, block by block, after those of ``earlier``."""
    widths = np.array([block.step_loss.shape[1] for block in blocks for _ in block.loss], int)
    step: Any = int(start.step) + np.cumsum(widths)
    epoch: Any = np.arange(1, len(widths) + 1)
    if earlier is None:
        epoch += int(start.step) // int(widths[0])
    else:
        epoch = np.append(earlier.epoch, earlier.epoch[-1] + epoch)
        step = np.append(earlier.step, step)
        blocks = [_program.Rows(earlier.loss, earlier.step_loss, earlier.metrics, earlier.validation), *blocks]
    # A stream may have more batches in one pass than in another.
    longest = max(block.step_loss.shape[1] for block in blocks)
    padded = [block._replace(step_loss=_padded(block.step_loss, longest)) for block in blocks]
    rows = jax.tree.map(lambda *parts: np.concatenate(parts), *padded)
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
