"""The update rule and the training loop: one rule, three batch sizes."""

from jaxnet.training._fit import Best, FitProgress, FitResult, History, Stopped, fit, sweep
from jaxnet.training._program import StopRule
from jaxnet.training._trajectory import trajectory
from jaxnet.training._update import TrainState, init_state, make_update

__all__ = [
    "Best",
    "FitProgress",
    "FitResult",
    "History",
    "StopRule",
    "Stopped",
    "TrainState",
    "fit",
    "init_state",
    "make_update",
    "sweep",
    "trajectory",
]


def __dir__() -> list[str]:
    return sorted(__all__)
