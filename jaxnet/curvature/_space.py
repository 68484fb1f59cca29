"""The vectors that an operator takes: pytrees like params, and the same laid out flat."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree


@dataclasses.dataclass(frozen=True)
class Space:
    """The vectors that an operator maps to one another: pytrees of one structure, of leaves of given shapes and dtypes.

    Attributes:
      structure: of the pytree.
      shapes: of its leaves.
      dtypes: of its leaves.
      apart: whether a leaf lies in parts on several devices.
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
        return cls(
            structure, tuple(map(jnp.shape, leaves)), tuple(map(jnp.result_type, leaves)), any(map(_apart, leaves))
        )

    @property
    def sizes(self) -> list[int]:
        """How many numbers each leaf holds."""
        return [int(np.prod(shape)) for shape in self.shapes]

    @property
    def size(self) -> int:
        """The dimension n."""
        return sum(self.sizes)

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
        """The same vector as one flat array a dtype, or its leaves as they are where one lies apart.

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
        # One draw for all leaves: XLA takes longer to compile a generator than to run it.
        dtype = jnp.promote_types(jnp.result_type(*self.dtypes), jnp.float32)
        uniform = jax.random.uniform(key, (self.size,), dtype, np.nextafter(np.array(-1, dtype), dtype.type(0)), 1)
        normal = 2**0.5 * jax.lax.erf_inv(uniform)
        ends = np.cumsum(self.sizes)
        leaves = [
            normal[end - size : end].reshape(shape).astype(dtype)
            for end, size, shape, dtype in zip(ends, self.sizes, self.shapes, self.dtypes, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(length, int) for length in x)


def _apart(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        # Of an explicit axis the type tells; of others only the compiler knows.
        return any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return isinstance(x, jax.Array) and not x.sharding.is_fully_replicated
