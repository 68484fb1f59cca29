"""The gradients of single examples, and the noise that they make of a mini-batch's gradient."""

from jaxnet.per_example._gradients import PerExampleGradients, gradients
from jaxnet.per_example._independent import check_independent
from jaxnet.per_example._noise import NoiseScale, noise_scale

__all__ = [
    "NoiseScale",
    "PerExampleGradients",
    "check_independent",
    "gradients",
    "noise_scale",
]


def __dir__() -> list[str]:
    return sorted(__all__)
