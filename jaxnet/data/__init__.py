"""Data sets that need no network, each an ``(inputs, targets)`` pair of arrays, and the orders they are seen in."""

from jaxnet.data.bundled import digits, mnist1d, mnist5k
from jaxnet.data.files import load
from jaxnet.data.orders import Order, batches, cyclic, independent, repeated, reshuffled, with_keys
from jaxnet.data.synthetic import two_gaussians, two_gaussians_exact

__all__ = [
    "Order",
    "batches",
    "cyclic",
    "digits",
    "independent",
    "load",
    "mnist1d",
    "mnist5k",
    "repeated",
    "reshuffled",
    "two_gaussians",
    "two_gaussians_exact",
    "with_keys",
]
