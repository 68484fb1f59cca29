"""The gradients of single examples, and the noise that they make of a mini-batch's gradient."""

from jaxnet.per_example.gradients import PerExampleGradients, gradients
from jaxnet.per_example.noise import NoiseScale, noise_scale

__all__ = ["NoiseScale", "PerExampleGradients", "gradients", "noise_scale"]
