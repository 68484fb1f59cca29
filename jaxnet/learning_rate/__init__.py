"""What curvature and gradient noise say of the learning rate."""

from jaxnet.learning_rate.analysis import Analysis, analyse
from jaxnet.learning_rate.measured import Ladder, measure_limits
from jaxnet.learning_rate.rates import (
    NoisyCurvature,
    for_batch_size,
    greedy,
    maximal,
    noisy_curvature,
    optimal,
)

__all__ = [
    "Analysis",
    "Ladder",
    "NoisyCurvature",
    "analyse",
    "for_batch_size",
    "greedy",
    "maximal",
    "measure_limits",
    "noisy_curvature",
    "optimal",
]
