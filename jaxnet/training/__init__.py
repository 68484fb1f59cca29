"""The update rule and the training loop: one rule, three batch sizes."""

from jaxnet.training.fit import Best, FitProgress, FitResult, History, Stopped, fit, sweep
from jaxnet.training.program import StopRule
from jaxnet.training.update import TrainState, init_state, make_update

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
]
