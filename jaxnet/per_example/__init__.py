"""The gradients of single examples, and the noise that they make of a mini-batch's gradient."""

from jaxnet.per_example._gradients import PerExampleGradients, gradients
from jaxnet.per_example._independent import check_independent
from jaxnet.per_example._noise import NoiseScale, noise_scale
from jaxnet.per_example._streamed import StreamedGradients

__all__ = [
    "NoiseScale",
    "PerExampleGradients",
    "StreamedGradients",
    "check_independent",
    "gradients",
    "noise_scale",
]


def __dir__() -> list[str]:
    return sorted(__all__)
