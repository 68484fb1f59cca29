"""JAX's control flow, or the same on the host where the data are there."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import contract
from jaxnet.dataset._streams import on_host
from jaxnet.mesh import on_automatic_axes

State = TypeVar("State")


def jit(function: Callable[..., Any], *, static_argnames: str | tuple[str, ...] = ()) -> Callable[..., Any]:
    """`jax.jit`, `on_automatic_axes`; a call with a stream among its arguments runs as it stands, on the host."""
    compiled = jax.jit(on_automatic_axes(function), static_argnames=static_argnames)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if on_host(args, kwargs) else compiled)(*args, **kwargs)

    return on_automatic_axes(call)


def while_loop(going_on: Callable[[State], Any], step: Callable[[State], State], state: State, *, data: Any) -> State:
    """`lax.while_loop`, or the same on the host where ``data`` holds a stream."""
    if not on_host(data):
        return lax.while_loop(going_on, step, state)
    while going_on(state):
        state = step(state)
    return state


def cond(which: Any, yes: Callable[..., State], no: Callable[..., State], *operands: Any, data: Any) -> State:
    """`lax.cond`, or the same on the host where ``data`` holds a stream."""
    if not on_host(data):
        return lax.cond(which, yes, no, *operands)
    return (yes if which else no)(*operands)


def map(function: Callable[[Any], Any], xs: Any, *, data: Any) -> Any:
    """`lax.map`, or the same on the host where ``data`` holds a stream."""
    if not on_host(data):
        return lax.map(function, xs)
    results = [function(jax.tree.map(lambda x, i=i: x[i], xs)) for i in range(contract.num_examples(xs))]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *results)
