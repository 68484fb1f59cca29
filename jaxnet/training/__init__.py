"""The update rule and the training loop: one rule, three batch sizes."""

from jaxnet.training._checkpoint import restore, save
from jaxnet.training._fit import fit, sweep
from jaxnet.training._history import Best, FitProgress, FitResult, History, Stopped
from jaxnet.training._observers import Checkpoints, JsonLines, TensorBoard
from jaxnet.training._optimizer import ValueFn, is_masked, with_extra_args
from jaxnet.training._program import StopRule
from jaxnet.training._trajectory import trajectory
from jaxnet.training._update import TrainState, init_state, make_update, with_rate

__all__ = [
    "Best",
    "Checkpoints",
    "FitProgress",
    "FitResult",
    "History",
    "JsonLines",
    "StopRule",
    "Stopped",
    "TensorBoard",
    "TrainState",
    "ValueFn",
    "fit",
    "init_state",
    "is_masked",
    "make_update",
    "restore",
    "save",
    "sweep",
    "trajectory",
    "with_extra_args",
    "with_rate",
]


def __dir__() -> list[str]:
    return sorted(__all__)
