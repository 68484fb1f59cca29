"""What curvature and gradient noise say of the learning rate."""

from jaxnet.learning_rate._adaptive import ScaleBySharpnessState, scale_by_sharpness, sharpness_sgd
from jaxnet.learning_rate._analysis import Analysis, analyse
from jaxnet.learning_rate._critical import CriticalSharpness, critical_sharpness
from jaxnet.learning_rate._mean_square import sgd_stability, stationary_excess
from jaxnet.learning_rate._measured import MeasuredStability, measure_stability
from jaxnet.learning_rate._population import MeasuredSgdStability, in_mean_square, measure_sgd_stability, one_by_one
from jaxnet.learning_rate._range_test import RangeTest, range_test
from jaxnet.learning_rate._rates import (
    NoisyCurvature,
    for_batch_size,
    greedy,
    linear_to_zero,
    maximal,
    noisy_curvature,
    optimal,
)
from jaxnet.learning_rate._stability import Stability, stability

__all__ = [
    "Analysis",
    "CriticalSharpness",
    "MeasuredStability",
    "NoisyCurvature",
    "RangeTest",
    "ScaleBySharpnessState",
    "MeasuredSgdStability",
    "Stability",
    "analyse",
    "critical_sharpness",
    "for_batch_size",
    "greedy",
    "in_mean_square",
    "linear_to_zero",
    "maximal",
    "measure_stability",
    "measure_sgd_stability",
    "noisy_curvature",
    "one_by_one",
    "optimal",
    "range_test",
    "scale_by_sharpness",
    "sgd_stability",
    "sharpness_sgd",
    "stability",
    "stationary_excess",
]


def __dir__() -> list[str]:
    return sorted(__all__)
