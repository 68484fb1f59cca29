"""The table of tokens."""

import jax
import jax.numpy as jnp

from jaxnet.contract import Array, ArrayTree
from jaxnet.nn._layer import Layer, Shape, layer_maker

standard_normal = jax.nn.initializers.normal(1.0)


@layer_maker
def embed(
    vocabulary: int, features: int, *, embedding_init: jax.nn.initializers.Initializer = standard_normal
) -> Layer:
    """y[n, t] = E[x[n, t]], the row of E (vocabulary, features) that each integer names.

    Args:
      vocabulary: the number of rows; tokens are 0…vocabulary − 1.
      features: the length of a row.
      embedding_init: a `jax.nn.initializers` function for E; by default standard normal.

    Returns:
      A `Layer` on integers (N, ...), such as (N, T), to (N, ..., features), with params ``{"embedding": E}``. A token
      outside 0…vocabulary − 1 gives NaN, never the row of another token.

    Raises:
      TypeError: the tokens are not integers.
      ValueError: a size is not positive.

    Reference:
      Bengio, Ducharme, Vincent & Jauvin, "A Neural Probabilistic Language Model", JMLR 2003, section 2 (the matrix C).
    """
    if vocabulary < 1 or features < 1:
        raise ValueError(f"embed: expected vocabulary and features >= 1, got {vocabulary} and {features}")

    def init(key: Array, input_shape: Shape) -> dict[str, Array]:
        return {"embedding": embedding_init(key, (vocabulary, features))}

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"embed: expected integer tokens, got {x.dtype}")
        rows = x.astype(jnp.int32)
        rows = jnp.where(rows == x, rows, -1)  # a 64-bit token does not come round to a row
        return params["embedding"].at[rows].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    return Layer(init, apply)
