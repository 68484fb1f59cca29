"""What curvature and gradient noise say of the learning rate."""

from jaxnet.learning_rate._adaptive import ScaleBySharpnessState, scale_by_sharpness, sharpness_sgd
from jaxnet.learning_rate._analysis import Analysis, analyse
from jaxnet.learning_rate._mean_square import sgd_maximal, stationary_excess
from jaxnet.learning_rate._measured import Ladder, measure_limits
from jaxnet.learning_rate._population import SgdLimit, in_mean_square, measure_sgd_limit, one_by_one
from jaxnet.learning_rate._range_test import RangeTest, range_test
from jaxnet.learning_rate._rates import (
    NoisyCurvature,
    for_batch_size,
    greedy,
    maximal,
    noisy_curvature,
    optimal,
)
from jaxnet.learning_rate._stability import Stability, stability, stability_limit

__all__ = [
    "Analysis",
    "Ladder",
    "NoisyCurvature",
    "RangeTest",
    "ScaleBySharpnessState",
    "SgdLimit",
    "Stability",
    "analyse",
    "for_batch_size",
    "greedy",
    "in_mean_square",
    "maximal",
    "measure_limits",
    "measure_sgd_limit",
    "noisy_curvature",
    "one_by_one",
    "optimal",
    "range_test",
    "scale_by_sharpness",
    "sgd_maximal",
    "sharpness_sgd",
    "stability",
    "stability_limit",
    "stationary_excess",
]


def __dir__() -> list[str]:
    return sorted(__all__)
