"""Where each leaf of the params enters a loss, and the two factors of its gradient there.

The loss of one example is traced. A leaf that one matrix product or convolution consumes, once, as its kernel, has the
gradient Σ_t a_t δ_tᵀ, with the other operand's rows a and the gradient δ at the product's output. So the trace is
evaluated with a zero ε added to that output, and a recorded on the way: differentiated by ε, one backward pass gives
every leaf's a and δ. The trace is followed through nested jits and rematerialisation; whatever else a leaf meets (a
second use, a loop, a custom derivative) is opaque.

Reference:
  Goodfellow, "Efficient Per-Example Gradient Computations", 2015; Rochette, Manoel & Tramel, "Efficient Per-Example
  Gradient Computations in Convolutional Neural Networks", 2019.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxnet.contract import Array, ArrayTree, Loss

Path = tuple[int, ...]
"""An equation by its index, and those of the equations that enclose it, outermost first."""
View = Callable[[Array], Array]
"""A rearrangement of a leaf's entries."""

# Primitives that only rearrange the entries of one operand.
_REARRANGE = {"reshape", "transpose", "squeeze", "expand_dims", "convert_element_type", "copy"}
# Primitives that hold one jaxpr and mean what it means, and the parameter that holds it.
_INLINE = {"jit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr"}


@dataclasses.dataclass(frozen=True)
class Tap:
    """The one use of a leaf as a kernel.

    Attributes:
      path: of the equation.
      operand: which of its two operands is the other one.
      output: the output's shape and dtype, those of ε.
      rows: ``rows(other operand, δ of the output)`` to ``(a (T, d), δ (T, p))``.
      matrix: the leaf as the kernel's matrix (d, p).
      words: what it is.
    """

    path: Path
    operand: int
    output: jax.ShapeDtypeStruct
    rows: Callable[[Array, Array], tuple[Array, Array]]
    matrix: View
    words: str


@dataclasses.dataclass(frozen=True)
class Trace:
    """A loss of one example, traced.

    Attributes:
      closed: its jaxpr over params' leaves and the example's.
      taps: for each leaf of params its `Tap`, or words for why there is none.
    """

    closed: core.ClosedJaxpr
    taps: tuple[Tap | str, ...]

    def evaluate(
        self, leaves: list[Array], example: ArrayTree, epsilons: dict[int, Array]
    ) -> tuple[Array, dict[int, Array]]:
        """The loss with ε added at the taps of the given leaves, and their other operands."""
        at = {tap.path: (i, tap) for i, tap in enumerate(self.taps) if i in epsilons and isinstance(tap, Tap)}
        record: dict[int, Array] = {}

        def run(jaxpr: core.Jaxpr, consts: Any, arguments: Any, path: Path) -> list[Any]:
            env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
            read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
            for index, eqn in enumerate(jaxpr.eqns):
                here, values = (*path, index), [read(v) for v in eqn.invars]
                if any(key[: len(here)] == here and key != here for key in at):
                    inner, inner_consts = _inner(eqn)
                    results = run(inner, inner_consts, values, here)
                else:
                    results = _apply(eqn, values)
                if here in at:
                    leaf, tap = at[here]
                    record[leaf] = values[tap.operand]
                    results = [results[0] + epsilons[leaf]]
                env.update(zip(eqn.outvars, results, strict=True))
            return [read(v) for v in jaxpr.outvars]

        value = run(self.closed.jaxpr, self.closed.consts, [*leaves, *jax.tree.leaves(example)], ())[0]
        return value, record


def trace(loss: Loss, params: ArrayTree, batch: ArrayTree) -> Trace:
    """The trace of ``loss`` on one example of ``batch``."""
    one = lambda p, example: loss(p, jax.tree.map(lambda x: x[None], example))
    shapes = lambda tree, skip: jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[skip:], x.dtype), tree)
    closed = jax.make_jaxpr(one)(shapes(params, 0), shapes(batch, 1))
    uses: list[list[Tap | str]] = [[] for _ in jax.tree.leaves(params)]
    views: dict[Any, tuple[int, View]] = {closed.jaxpr.invars[i]: (i, _same) for i in range(len(uses))}
    _find(closed.jaxpr, views, (), uses)
    return Trace(closed, tuple(_only(found) for found in uses))


def _same(x: Array) -> Array:
    return x


def _only(found: list[Tap | str]) -> Tap | str:
    if len(found) == 1:
        return found[0]
    words = [use if isinstance(use, str) else use.words for use in found]
    return f"used {len(found)} times: {', '.join(words)}" if found else "not used"


def _inner(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Any]:
    held = eqn.params[_INLINE[eqn.primitive.name]]
    return (held.jaxpr, held.consts) if isinstance(held, core.ClosedJaxpr) else (held, ())


def _find(
    jaxpr: core.Jaxpr, views: dict[Any, tuple[int, View]], path: Path, uses: list[list[Tap | str]]
) -> list[tuple[int, View] | None]:
    """Note every use of the leaves of which ``views`` holds rearrangements; which of them the jaxpr returns."""
    for index, eqn in enumerate(jaxpr.eqns):
        held = [None if isinstance(v, core.Literal) else views.get(v) for v in eqn.invars]
        if not any(held):
            continue
        name, here = eqn.primitive.name, (*path, index)
        if name in _REARRANGE or (name == "broadcast_in_dim" and _size(eqn.invars[0]) == _size(eqn.outvars[0])):
            leaf, before = next(filter(None, held))
            views[eqn.outvars[0]] = leaf, _then(before, eqn)
        elif name in _INLINE:
            inner, _ = _inner(eqn)
            passed = {v: view for v, view in zip(inner.invars, held, strict=True) if view}
            returned = _find(inner, passed, here, uses)
            views.update((v, view) for v, view in zip(eqn.outvars, returned, strict=True) if view)
        else:
            rule = _RULES.get(name)
            for position, view in enumerate(held):
                if view:
                    leaf, before = view
                    tap = rule(eqn, position, before, here) if rule and held.count(None) == len(held) - 1 else None
                    uses[leaf].append(tap or name)
    returned = [None if isinstance(v, core.Literal) else views.get(v) for v in jaxpr.outvars]
    if not path:
        for view in filter(None, returned):
            uses[view[0]].append("the loss itself")
    return returned


def _shape(v: Any) -> tuple[int, ...]:
    return v.aval.shape


def _size(v: Any) -> int:
    return int(np.prod(_shape(v)))


def _then(before: View, eqn: core.JaxprEqn) -> View:
    return lambda x: _apply(eqn, [before(x)])[0]


def _apply(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """One equation by itself, as the jaxpr that JAX knows how to evaluate."""
    given = {v: value for v, value in zip(eqn.invars, values, strict=True) if not isinstance(v, core.Literal)}
    about = core.DebugInfo("per_example", eqn.primitive.name, None, None)
    alone = core.Jaxpr((), list(given), eqn.outvars, [eqn], debug_info=about)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())


def _output(eqn: core.JaxprEqn) -> jax.ShapeDtypeStruct:
    aval: Any = eqn.outvars[0].aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _dot_general(eqn: core.JaxprEqn, position: int, before: View, path: Path) -> Tap | None:
    """K (d, p) of a product without batch dimensions: the output's axes are the free ones, left before right."""
    contracting, batching = eqn.params["dimension_numbers"]
    if any(map(len, batching)):
        return None
    other = 1 - position
    mine, theirs = tuple(contracting[position]), tuple(contracting[other])
    free = tuple(i for i in range(len(_shape(eqn.invars[position]))) if i not in mine)
    rest = tuple(i for i in range(len(_shape(eqn.invars[other]))) if i not in theirs)

    def rows(a: Array, delta: Array) -> tuple[Array, Array]:
        a = jnp.transpose(a, (*rest, *theirs))
        d = int(np.prod(a.shape[len(rest) :]))
        if position == 0:
            delta = jnp.moveaxis(delta, range(len(free)), range(-len(free), 0))
        steps = int(np.prod(delta.shape[: len(rest)]))
        return a.reshape(steps, d), delta.reshape(steps, -1)

    def matrix(leaf: Array) -> Array:
        kernel = jnp.transpose(before(leaf), (*mine, *free))
        return kernel.reshape(int(np.prod(kernel.shape[: len(mine)])), -1)

    return Tap(path, other, _output(eqn), rows, matrix, "a matrix product")


def _conv_general_dilated(eqn: core.JaxprEqn, position: int, before: View, path: Path) -> Tap | None:
    """A convolution is the product of the input's patches (T, d) with the kernel as a matrix (d, p)."""
    options = eqn.params
    if position == 0 or options["feature_group_count"] != 1 or options["batch_group_count"] != 1:
        return None
    numbers = options["dimension_numbers"]
    kernel_spec, out_spec = numbers.rhs_spec, numbers.out_spec
    window = [_shape(eqn.invars[1])[i] for i in kernel_spec[2:]]

    def rows(a: Array, delta: Array) -> tuple[Array, Array]:
        # Channels first: the patches' entries then come in the order (channel, window).
        patches = lax.conv_general_dilated_patches(
            jnp.transpose(a, numbers.lhs_spec),
            window,
            options["window_strides"],
            options["padding"],
            options["lhs_dilation"],
            options["rhs_dilation"],
        )
        last = lambda x: jnp.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
        return last(patches), last(jnp.transpose(delta, out_spec))

    def matrix(leaf: Array) -> Array:
        kernel = jnp.transpose(before(leaf), kernel_spec)
        return kernel.reshape(kernel.shape[0], -1).T

    return Tap(path, 0, _output(eqn), rows, matrix, "a convolution")


_RULES = {"dot_general": _dot_general, "conv_general_dilated": _conv_general_dilated}
