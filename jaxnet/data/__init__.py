"""Data sets that need no network, each an ``(inputs, targets)`` pair of arrays, and the orders they are seen in."""

from jaxnet.data._bundled import digits, mnist1d, mnist5k
from jaxnet.data._files import Contents, load, read
from jaxnet.data._orders import (
    Order,
    batches,
    check_num_shards,
    cyclic,
    in_shards,
    independent,
    repeated,
    reshuffled,
    rows_in_shards,
    with_keys,
)
from jaxnet.data._synthetic import two_gaussians, two_gaussians_exact

__all__ = [
    "Contents",
    "Order",
    "batches",
    "check_num_shards",
    "cyclic",
    "digits",
    "in_shards",
    "independent",
    "load",
    "mnist1d",
    "mnist5k",
    "read",
    "repeated",
    "reshuffled",
    "rows_in_shards",
    "two_gaussians",
    "two_gaussians_exact",
    "with_keys",
]


def __dir__() -> list[str]:
    return sorted(__all__)
