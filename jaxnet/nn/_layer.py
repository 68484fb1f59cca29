"""The layer: two pure functions, and the ways to put layers together."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol

import jax
import jax.numpy as jnp

from jaxnet.contract import Array, ArrayTree

Shape = tuple[int, ...]
P = ParamSpec("P")


class Init(Protocol):
    """``init(key, input_shape) -> params``; ``input_shape`` is the shape of one example."""

    def __call__(self, key: Array, input_shape: Shape) -> Any:
        """Draw the parameters."""


class Apply(Protocol):
    """``apply(params, x, *, key=None) -> y``; ``x`` has a leading axis of examples."""

    def __call__(self, params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        """Run the layer on a batch."""


class Layer(NamedTuple):
    """A network or a part of one.

    Attributes:
      init: ``init(key, input_shape) -> params``, with the shape of one example.
      apply: ``apply(params, x, *, key=None) -> y`` on a batch; ``key`` is for layers that are random.
    """

    init: Init
    apply: Apply


def layer_maker(make: Callable[P, Layer]) -> Callable[P, Layer]:
    """Let equal arguments give the very same layer, so that losses made from equal networks share a compilation."""
    signature, remembered = inspect.signature(make), functools.cache(make)

    @functools.wraps(make)
    def maker(*args: P.args, **kwargs: P.kwargs) -> Layer:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        try:
            hash((call.args, tuple(call.kwargs.values())))
        except TypeError:
            return make(*args, **kwargs)
        return remembered(*call.args, **call.kwargs)

    return maker


def no_params(key: Array, input_shape: Shape) -> tuple[()]:
    """The ``init`` of a layer that has nothing to learn."""
    return ()


@layer_maker
def activation(fn: Callable[[Array], Array]) -> Layer:
    """y = fn(x), without parameters. ``fn`` must treat the examples on the leading axis independently."""
    return Layer(no_params, lambda params, x, *, key=None: fn(x))


@layer_maker
def remat(layer: Layer) -> Layer:
    """The same layer, whose intermediates are computed anew in the backward pass and not kept.

    A network of L such layers holds the L inputs of its layers, and the intermediates of one, for about one forward
    pass more: the way for deep networks. Hessian products and per-example gradients gain alike.

    Args:
      layer: a part of a network, such as one block of several layers.

    Reference:
      Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, section 4.1.
    """
    apply = jax.checkpoint(lambda params, x, key: layer.apply(params, x, key=key))
    return Layer(layer.init, lambda params, x, *, key=None: apply(params, x, key))


@layer_maker
def flatten() -> Layer:
    """(N, ...) to (N, product of the rest)."""
    return Layer(no_params, lambda params, x, *, key=None: x.reshape(x.shape[0], -1))


@layer_maker
def dropout(rate: float) -> Layer:
    """Inverted dropout: y = x·m/(1 − rate), m ~ Bernoulli(1 − rate) elementwise; the identity when ``key`` is None.

    Raises:
      ValueError: ``rate`` is not in [0, 1).

    Reference:
      Srivastava et al., "Dropout", JMLR 2014, section 4 (scaled at training time instead of at test time).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: expected a rate in [0, 1), got {rate}")

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        if key is None or rate == 0:
            return x
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))

    return Layer(no_params, apply)


def _split(key: Array | None, num: int) -> list[Array | None]:
    return [None] * num if key is None else list(jax.random.split(key, num))


def _shape_after(layer: Layer, params: ArrayTree, shape: Shape) -> Shape:
    """The shape of one example after the layer: of floats or, where it refuses them, of integers (tokens)."""
    after = lambda dtype: jax.eval_shape(layer.apply, params, jax.ShapeDtypeStruct((1, *shape), dtype)).shape[1:]
    try:
        return after(jnp.result_type(float))
    except TypeError:
        return after(jnp.int32)


@layer_maker
def serial(*layers: Layer) -> Layer:
    """The composition of layers, first to last; params are a tuple, one entry a layer."""

    def init(key: Array, input_shape: Shape) -> tuple[ArrayTree, ...]:
        params, shape = [], input_shape
        for layer, layer_key in zip(layers, jax.random.split(key, max(len(layers), 1)), strict=False):
            params.append(layer.init(layer_key, shape))
            shape = _shape_after(layer, params[-1], shape)
        return tuple(params)

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        for layer, p, layer_key in zip(layers, params, _split(key, len(layers)), strict=True):
            x = layer.apply(p, x, key=layer_key)
        return x

    return Layer(init, apply)


@layer_maker
def residual(layer: Layer) -> Layer:
    """y = x + layer(x); params are the inner layer's.

    Raises:
      ValueError: at trace time, if the layer changes the shape.

    Reference:
      He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, eq. 1.
    """

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        y = layer.apply(params, x, key=key)
        if y.shape != x.shape:
            raise ValueError(f"residual: the layer must keep the shape {x.shape}, got {y.shape}")
        return x + y

    return Layer(layer.init, apply)
