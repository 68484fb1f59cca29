"""The vectors that an operator takes: pytrees like params, and the same laid out flat."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree
from jaxnet.curvature._lanczos import positions


@dataclasses.dataclass(frozen=True)
class Space:
    """The vectors that an operator maps to one another: pytrees of one structure, of leaves of given shapes and dtypes.

    Attributes:
      structure: of the pytree.
      shapes: of its leaves.
      dtypes: of its leaves.
      apart: whether a leaf may lie in parts on several devices; of an argument of a `jit` only the compiler knows.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    apart: bool = False

    @classmethod
    def of(cls, tree: ArrayTree) -> "Space":
        """The space that a pytree of real floating arrays, such as params, belongs to.

        Raises:
          TypeError, ValueError: the pytree has another leaf, or none.
        """
        contract.check_params(tree)
        leaves, structure = jax.tree.flatten(tree)
        apart = jax.device_count() > 1
        return cls(structure, tuple(map(jnp.shape, leaves)), tuple(map(jnp.result_type, leaves)), apart)

    @property
    def sizes(self) -> list[int]:
        """How many numbers each leaf holds."""
        return [int(np.prod(shape)) for shape in self.shapes]

    @property
    def size(self) -> int:
        """The dimension n."""
        return sum(self.sizes)

    @property
    def names(self) -> list[str]:
        """The leaves' names, as `restrict` matches them."""
        return contract.leaf_names(jax.tree.unflatten(self.structure, self.sizes))

    def check(self, name: str, tree: ArrayTree) -> None:
        """Raise unless ``tree`` belongs to the space, by structure and shapes.

        Raises:
          ValueError: it does not; ``name`` is what the message calls it.
        """
        like = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        contract.check_alike(name, tree, jax.tree.unflatten(self.structure, like))

    def zeros(self) -> ArrayTree:
        """The zero vector."""
        leaves = [jnp.zeros(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    @property
    def flat(self) -> "Space":
        """The space of vectors as `ravel` lays them out."""
        if self.apart:
            return dataclasses.replace(self, structure=jax.tree.structure(self.shapes, is_leaf=_is_shape))
        sizes = self.sizes
        dtypes = tuple(self.dtypes[places[0]] for places in self._alike)
        shapes = tuple((sum(sizes[i] for i in places),) for places in self._alike)
        return Space(jax.tree.structure(dtypes), shapes, dtypes)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each leaf begins in the flat array that it is a part of.

        As an argument of a compiled program, and no constant in it, they let XLA compile one kernel for all leaves of
        one shape that it cuts out, and whatever then becomes of them, where it takes one a leaf otherwise.
        """
        sizes = self.sizes
        found: dict[int, int] = {}
        for places in self._alike:
            ends = np.cumsum([sizes[i] for i in places])
            found |= {i: int(end) - sizes[i] for i, end in zip(places, ends, strict=True)}
        return tuple(found[i] for i in range(len(sizes)))

    @functools.partial(jax.jit, static_argnums=0)
    def ravel(self, tree: ArrayTree) -> tuple[Array, ...]:
        """The same vector as one flat array a dtype, or its leaves as they are where one may lie apart.

        What works on a flat array is compiled once and not once a leaf; but leaves of other shardings cannot be joined
        without moving them.
        """
        leaves = jax.tree.leaves(tree)
        if self.apart:
            return tuple(leaves)
        return tuple(jnp.concatenate([leaves[i].reshape(-1) for i in places]) for places in self._alike)

    def unravel(self, flat: tuple[Array, ...], starts: tuple[Any, ...] | None = None) -> ArrayTree:
        """The pytree of such arrays; of several vectors with a leading axis, so are its leaves.

        Args:
          flat: as `ravel` gives them.
          starts: `starts`, where a compiled program has them among its arguments.
        """
        return self._cut(flat, self.starts if starts is None else starts)

    @functools.partial(jax.jit, static_argnums=0)
    def _cut(self, flat: tuple[Array, ...], starts: tuple[Any, ...]) -> ArrayTree:
        if self.apart:
            return jax.tree.unflatten(self.structure, flat)
        leaves, sizes = list(starts), self.sizes
        for joined, places in zip(flat, self._alike, strict=True):
            for i in places:
                part = lax.dynamic_slice_in_dim(joined, starts[i], sizes[i], -1) if len(places) > 1 else joined
                leaves[i] = part.reshape(*joined.shape[:-1], *self.shapes[i])
        return jax.tree.unflatten(self.structure, leaves)

    @property
    def _alike(self) -> list[list[int]]:
        """The leaves of each dtype, by their positions."""
        return [[i for i, d in enumerate(self.dtypes) if d == dtype] for dtype in dict.fromkeys(self.dtypes)]

    def random(self, key: Array) -> ArrayTree:
        """A standard normal vector."""
        # By the entries' positions, so that each device draws its part of the same numbers, wherever leaves lie.
        words, first = jax.random.key_data(key), 0
        leaves: list[Any] = [None] * len(self.shapes)
        for i in itertools.chain(*self._alike):
            where = positions(self.shapes[i], first)
            high, low = threefry2x32_p.bind(words[0], words[1], jnp.zeros_like(where), where)
            leaves[i] = _normal(high, low, jnp.promote_types(self.dtypes[i], jnp.float32)).astype(self.dtypes[i])
            first += self.sizes[i]
        return jax.tree.unflatten(self.structure, leaves)


def _normal(high: Array, low: Array, dtype: Any) -> Array:
    """Normal numbers from 64 random bits each."""
    if dtype == jnp.float64:
        whole, bits = high.astype(dtype) * 2**20 + (low >> 12).astype(dtype), 52
    else:
        whole, bits = ((high ^ low) >> 8).astype(dtype), 24
    # The middles of so many equal parts of (−1, 1).
    return 2**0.5 * jax.lax.erf_inv(whole * 2.0 ** (1 - bits) - (1 - 2.0**-bits))


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(length, int) for length in x)
