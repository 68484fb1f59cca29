"""The affine layer."""

import jax

from jaxnet.contract import Array, ArrayTree
from jaxnet.nn._layer import Layer, Shape, layer_maker

lecun_normal = jax.nn.initializers.lecun_normal()
zeros = jax.nn.initializers.zeros


@layer_maker
def dense(
    features: int,
    *,
    use_bias: bool = True,
    kernel_init: jax.nn.initializers.Initializer = lecun_normal,
    bias_init: jax.nn.initializers.Initializer = zeros,
) -> Layer:
    """y = xW + b on the last axis, with W (in, features) and b (features,).

    Args:
      features: the number of outputs.
      use_bias: whether there is a b.
      kernel_init: a `jax.nn.initializers` function for W; by default variance 1/in.
      bias_init: one for b; zeros by default.

    Returns:
      A `Layer` with params ``{"kernel": W, "bias": b}``.

    Raises:
      ValueError: ``features`` is not positive, or the input has no axis to act on.

    Reference:
      LeCun et al., "Efficient BackProp", 1998, eq. 16 (the standard deviation in^−½ of the initial weights).
    """
    if features < 1:
        raise ValueError(f"dense: expected features >= 1, got {features}")

    def init(key: Array, input_shape: Shape) -> dict[str, Array]:
        if not input_shape:
            raise ValueError("dense: expected examples with at least one axis, got scalars")
        kernel_key, bias_key = jax.random.split(key)
        params = {"kernel": kernel_init(kernel_key, (input_shape[-1], features))}
        if use_bias:
            params["bias"] = bias_init(bias_key, (features,))
        return params

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        if x.ndim < 2 or x.shape[-1] != params["kernel"].shape[0]:
            raise ValueError(
                f"dense: expected inputs (N, ..., {params['kernel'].shape[0]}) for its kernel, got {x.shape}"
            )
        y = x @ params["kernel"]
        return y + params["bias"] if use_bias else y

    return Layer(init, apply)
