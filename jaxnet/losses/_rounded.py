"""Functions of params and data that are computed in another precision than the params'."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxnet.contract import Array, ArrayTree, Loss


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A function of params and data, computed in another precision; its result is in the params' own."""

    _WITHIN: ClassVar = "function"
    function: Callable[..., Array]
    dtype: Any

    def __call__(self, params: ArrayTree, data: Any, **further: Any) -> Array:
        """The function of what is rounded."""
        own = jnp.result_type(*jax.tree.leaves(params))
        cast = lambda x: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        rounded = lambda tree: jax.tree.map(lambda x: cast(jnp.asarray(x)), tree)
        return self.function(rounded(params), rounded(data), **further).astype(own)


def rounding(loss: Loss) -> float:
    """What `mixed_precision` leaves of a loss, relative to it: eps of its precision; 0 of any other loss."""
    found = [part for part in (loss, getattr(loss, "apply", None)) if isinstance(part, Rounded)]
    return float(jnp.finfo(found[0].dtype).eps) if found else 0.0
