"""The gradients of single examples, and the noise that they make of a mini-batch's gradient."""

from jaxnet.per_example._clipped import ClippedGrad, Clipping, clipped_grad
from jaxnet.per_example._gradients import PerExampleGradients, gradients
from jaxnet.per_example._independent import check_independent
from jaxnet.per_example._noise import NoiseScale, layer_noise_scale, noise_scale
from jaxnet.per_example._running_noise import (
    NoiseAverage,
    WithNoiseScaleState,
    noise_average,
    running_noise_scale,
    with_noise_scale,
)

__all__ = [
    "ClippedGrad",
    "Clipping",
    "NoiseAverage",
    "NoiseScale",
    "PerExampleGradients",
    "WithNoiseScaleState",
    "check_independent",
    "clipped_grad",
    "gradients",
    "layer_noise_scale",
    "noise_average",
    "noise_scale",
    "running_noise_scale",
    "with_noise_scale",
]


def __dir__() -> list[str]:
    return sorted(__all__)
