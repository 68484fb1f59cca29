"""Convolution and pooling on images (N, height, width, channels).

Written as slices, concatenations and one matrix product. XLA's own convolution is several times slower
inside a CPU loop than outside, because its gradients are then not brought to the form of the fast kernel,
and training is a loop; patches and a product run at the same speed everywhere.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet.contract import Array, ArrayTree
from jaxnet.nn._dense import lecun_normal, zeros
from jaxnet.nn._layer import Layer, Shape, layer_maker, no_params

Pair = int | Sequence[int]


def _pair(name: str, value: Pair) -> tuple[int, int]:
    height, width = value if isinstance(value, Sequence) else (value, value)
    if height < 1 or width < 1:
        raise ValueError(f"{name}: expected positive sizes, got {value}")
    return int(height), int(width)


def _check_image(name: str, shape: Shape, window: tuple[int, int]) -> None:
    if len(shape) != 3:
        raise ValueError(f"{name}: expected images (N, height, width, channels), got (N, *{shape})")
    if shape[0] < window[0] or shape[1] < window[1]:
        raise ValueError(f"{name}: its window {window} is larger than the image {shape[:2]}")


def _patches(x: Array, window: tuple[int, int], strides: tuple[int, int]) -> Array:
    """All windows of images (C, N, H, W), as (kh·kw·C, N, H', W'), by rows after columns: kh + kw slices."""
    (kh, kw), (sh, sw) = window, strides
    height, width = (x.shape[2] - kh) // sh + 1, (x.shape[3] - kw) // sw + 1
    x = jnp.concatenate([x[..., j : j + sw * (width - 1) + 1 : sw] for j in range(kw)])
    return jnp.concatenate([x[:, :, i : i + sh * (height - 1) + 1 : sh] for i in range(kh)])


@layer_maker
def conv(
    features: int,
    kernel_size: Pair = 3,
    *,
    strides: Pair = 1,
    padding: str = "SAME",
    use_bias: bool = True,
    kernel_init: jax.nn.initializers.Initializer = lecun_normal,
    bias_init: jax.nn.initializers.Initializer = zeros,
) -> Layer:
    """y[n, i, j, o] = Σ_{a, b, c} x[n, s·i + a, s·j + b, c] K[a, b, c, o] + b[o], a correlation of images.

    Args:
      features: the number of output channels.
      kernel_size: (height, width) of the kernel, or one number for both.
      strides: step between windows, likewise.
      padding: "SAME" (zeros around, output ⌈size/stride⌉) or "VALID" (windows inside the image only).
      use_bias: whether there is a b.
      kernel_init: a `jax.nn.initializers` function for K; by default variance 1/(height·width·in).
      bias_init: one for b; zeros by default.

    Returns:
      A `Layer` with params ``{"kernel": (height, width, in, features), "bias": (features,)}``.

    Raises:
      ValueError: a size is not positive, the padding unknown, or the kernel larger than the image.
    """
    window, steps = _pair("conv kernel_size", kernel_size), _pair("conv strides", strides)
    if features < 1:
        raise ValueError(f"conv: expected features >= 1, got {features}")
    if padding not in ("SAME", "VALID"):
        raise ValueError(f'conv: expected padding "SAME" or "VALID", got {padding!r}')

    def init(key: Array, input_shape: Shape) -> dict[str, Array]:
        _check_image("conv", input_shape, window if padding == "VALID" else (1, 1))
        kernel_key, bias_key = jax.random.split(key)
        params = {"kernel": kernel_init(kernel_key, (*window, input_shape[-1], features))}
        if use_bias:
            params["bias"] = bias_init(bias_key, (features,))
        return params

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        _check_image("conv", x.shape[1:], window if padding == "VALID" else (1, 1))
        kernel = params["kernel"]
        if x.shape[-1] != kernel.shape[2]:
            raise ValueError(f"conv: expected {kernel.shape[2]} channels for its kernel, got images {x.shape}")
        pads = lax.padtype_to_pads(x.shape[1:3], window, steps, padding)
        # Channels first: the copies are then of whole rows, and the product's long axis is contiguous.
        channels_first = jnp.pad(jnp.moveaxis(x, 3, 0), ((0, 0), (0, 0), *pads))
        patches = _patches(channels_first, window, steps)
        rows = kernel.reshape(-1, kernel.shape[-1]).T @ patches.reshape(patches.shape[0], -1)
        y = jnp.moveaxis(rows.reshape(-1, *patches.shape[1:]), 0, 3)
        return y + params["bias"] if use_bias else y

    return Layer(init, apply)


def _pool(name: str, window: Pair, combine: Callable[[Array, Array], Array], scale: float) -> Layer:
    kh, kw = _pair(f"{name} window", window)

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        _check_image(name, x.shape[1:], (kh, kw))
        n, height, width, channels = x.shape
        height, width = height // kh, width // kw
        rows = x[:, : height * kh, : width * kw].reshape(n, height, kh, width * kw, channels)
        x = reduce(combine, (rows[:, :, i] for i in range(kh))).reshape(n, height, width, kw * channels)
        return scale * reduce(combine, (x[..., j * channels : (j + 1) * channels] for j in range(kw)))

    return Layer(no_params, apply)


@layer_maker
def max_pool(window: Pair = 2) -> Layer:
    """The maximum of each of the disjoint windows; rows and columns that do not fill one are dropped.

    Args:
      window: (height, width), or one number for both.

    Raises:
      ValueError: the window is not positive, or larger than the image.
    """
    return _pool("max_pool", window, jnp.maximum, 1)


@layer_maker
def avg_pool(window: Pair = 2) -> Layer:
    """The mean of each of the disjoint windows; rows and columns that do not fill one are dropped.

    Args:
      window: (height, width), or one number for both.

    Raises:
      ValueError: the window is not positive, or larger than the image.
    """
    return _pool("avg_pool", window, operator.add, 1 / math.prod(_pair("avg_pool window", window)))
