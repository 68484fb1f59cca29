"""What a pass over a data set in batches held, told by hashes of its examples."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import contract


@dataclasses.dataclass
class Content:
    """What a pass held: N, and the sums of the examples' hashes, in whatever order and in this one."""

    num: int = 0
    in_any_order: int = 0
    in_this_order: int = 0

    def add(self, batch: Any) -> None:
        """Take in the next batch."""
        n = contract.num_examples(batch)
        hashes = np.zeros(n, np.uint64)
        for place, leaf in enumerate(jax.tree.leaves(batch)):
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                continue
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            content = np.ascontiguousarray(leaf).reshape(n, -1).view(np.uint8)
            words = np.pad(content, ((0, 0), (0, -content.shape[1] % 8))).view(np.uint64)
            weights = _mixed(np.arange(words.shape[1], dtype=np.uint64) + np.uint64(place << 40))
            hashes += (words * weights).sum(axis=1)
        hashes = _mixed(hashes)
        places = np.arange(self.num + 1, self.num + n + 1, dtype=np.uint64)
        self.num += n
        self.in_any_order = (self.in_any_order + int(hashes.sum())) % 2**64
        self.in_this_order = (self.in_this_order + int((hashes * places).sum())) % 2**64


def _mixed(x: np.ndarray) -> np.ndarray:
    """Odd numbers of 64 bits, each of which depends on all bits of one of x.

    Reference:
      Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 16.
    """
    x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
