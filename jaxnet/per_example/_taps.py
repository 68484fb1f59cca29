"""Where each leaf of the params enters a loss, and the two factors of its gradient there.

The loss of one example is traced. A leaf that one matrix product or convolution consumes, once, as its kernel, has the
gradient Σ_t a_t δ_tᵀ, with the other operand's rows a and the gradient δ at the product's output. So the trace is
evaluated with a zero ε added to that output, and a recorded on the way: differentiated by ε, one backward pass gives
every leaf's a and δ. The trace is followed through nested jits, rematerialisation and scans, over layers or over time;
whatever else a leaf meets (a second use, another loop, a custom derivative) is opaque.

Reference:
  Goodfellow, "Efficient Per-Example Gradient Computations", 2015; Rochette, Manoel & Tramel, "Efficient Per-Example
  Gradient Computations in Convolutional Neural Networks", 2019.
"""

import dataclasses
import functools
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
Epsilons = dict[int, Array]
"""For each tapped leaf, by its position, the ε at its output."""

# Primitives that only rearrange the entries of one operand.
_REARRANGE = {"reshape", "transpose", "squeeze", "expand_dims", "convert_element_type", "copy"}
# Primitives that hold one jaxpr and mean what it means, and the parameter that holds it; 0.11 renamed the second.
_INLINE = {"jit": "jaxpr", "closed_call": "call_jaxpr", "eval_jaxpr": "call_jaxpr", "remat2": "jaxpr"}
# Those that the taps enter.
_ENTER = {**_INLINE, "scan": "jaxpr"}


@dataclasses.dataclass(frozen=True)
class Tap:
    """The one use of a leaf as a kernel.

    Attributes:
      path: of the equation.
      operand: which of its two operands is the other one.
      output: the output's shape and dtype, those of ε.
      rows: ``rows(other operand, δ of the output)`` to ``(a (S, T, d), δ (S, T, p))``.
      matrix: the leaf as its kernels' matrices (S, d, p): S = 1, or the layers that a scan passes through.
      description: what it is, for people.
    """

    path: Path
    operand: int
    output: jax.ShapeDtypeStruct
    rows: Callable[[Array, Array], tuple[Array, Array]]
    matrix: View
    description: str


@dataclasses.dataclass(frozen=True)
class Trace:
    """A loss of one example, traced.

    Attributes:
      closed: its jaxpr over params' leaves and the example's.
      taps: for each leaf of params its `Tap`, or words for why there is none.
    """

    closed: core.ClosedJaxpr
    taps: tuple[Tap | str, ...]

    def evaluate(self, leaves: list[Array], example: ArrayTree, epsilons: Epsilons) -> tuple[Array, dict[int, Array]]:
        """The loss with ε added at the taps of the given leaves, and their other operands."""
        taps = {i: tap for i, tap in enumerate(self.taps) if isinstance(tap, Tap)}

        def run(
            jaxpr: core.Jaxpr, consts: Any, arguments: Any, path: Path, epsilons: Epsilons
        ) -> tuple[list[Any], Any]:
            env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
            read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
            record: dict[int, Array] = {}
            for index, eqn in enumerate(jaxpr.eqns):
                here, values = (*path, index), [read(v) for v in eqn.invars]
                within = {i: epsilon for i, epsilon in epsilons.items() if taps[i].path[: len(here)] == here}
                leaf = next((i for i in within if taps[i].path == here), None)
                if leaf is not None:
                    record[leaf] = values[taps[leaf].operand]
                    results = [_apply(eqn, values)[0] + epsilons[leaf]]
                elif within:
                    inner, inner_consts = _inner(eqn)
                    body = lambda values, epsilons: run(inner, inner_consts, values, here, epsilons)
                    enter = _scanned if eqn.primitive.name == "scan" else _inlined
                    results, found = enter(eqn, body, values, within)
                    record |= found
                else:
                    results = _apply(eqn, values)
                env.update(zip(eqn.outvars, results, strict=True))
            return [read(v) for v in jaxpr.outvars], record

        arguments = [*leaves, *jax.tree.leaves(example)]
        (value,), record = run(self.closed.jaxpr, self.closed.consts, arguments, (), epsilons)
        return value, record


def _inlined(eqn: core.JaxprEqn, body: Any, values: list[Any], epsilons: Epsilons) -> tuple[list[Any], Any]:
    return body(values, epsilons)


def _scanned(eqn: core.JaxprEqn, body: Any, values: list[Any], epsilons: Epsilons) -> tuple[list[Any], Any]:
    """The scan again, with ε as one more of its inputs and what is recorded as one more of its outputs."""
    options = eqn.params
    num_consts, num_carry = _scan_counts(eqn)
    consts, carry, xs = values[:num_consts], values[num_consts:][:num_carry], values[num_consts + num_carry :]

    def step(carry: list[Any], slices: Any) -> tuple[list[Any], Any]:
        results, record = body([*consts, *carry, *slices[0]], slices[1])
        return results[:num_carry], (results[num_carry:], record)

    how = {name: options[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, record) = lax.scan(step, carry, (xs, epsilons), **how)
    return [*carry, *ys], record


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
    uses = [use if isinstance(use, str) else use.description for use in found]
    return f"used {len(found)} times: {', '.join(uses)}" if found else "not used"


def _inner(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Any]:
    held = eqn.params[_ENTER[eqn.primitive.name]]
    return (held.jaxpr, held.consts) if isinstance(held, core.ClosedJaxpr) else (held, ())


def _scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """How many of a scan's operands are its constants, which come first, and how many its carry, which come next."""
    if "ft_in" in eqn.params:  # from JAX 0.11 on: a tree of consts, carry and xs
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


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
        elif name == "scan":
            _find_in_scan(eqn, held, here, uses)
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


def _find_in_scan(
    eqn: core.JaxprEqn, held: list[tuple[int, View] | None], here: Path, uses: list[list[Tap | str]]
) -> None:
    """A leaf scanned over is S layers' kernels; one that every step shares has the steps' rows in its one sum."""
    inner, _ = _inner(eqn)
    first_carry, num_carry = _scan_counts(eqn)
    first_scanned, length = first_carry + num_carry, eqn.params["length"]
    is_carry = lambda position: first_carry <= position < first_scanned
    # By position, not by leaf: one leaf may come in twice, and two may meet in the body.
    found: list[list[Tap | str]] = [
        ["the carry of a scan"] if is_carry(position) else [] for position in range(len(held))
    ]
    passed = {
        inner.invars[position]: (position, _same if position >= first_scanned else view[1])
        for position, view in enumerate(held)
        if view and not is_carry(position)
    }
    for returned in filter(None, _find(inner, passed, here, found)):
        found[returned[0]].append("scan")
    for position, view in enumerate(held):
        if view:
            wrap = functools.partial(_layers, before=view[1]) if position >= first_scanned else _steps
            uses[view[0]].extend(use if isinstance(use, str) else wrap(use, length) for use in found[position])


def _longer(output: jax.ShapeDtypeStruct, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((length, *output.shape), output.dtype)


def _layers(tap: Tap, length: int, *, before: View) -> Tap:
    """The tap of a scan's body as that of the whole, where each step has a kernel of its own."""
    merged = lambda x: x.reshape(-1, *x.shape[2:])
    return dataclasses.replace(
        tap,
        output=_longer(tap.output, length),
        rows=lambda a, delta: jax.tree.map(merged, jax.vmap(tap.rows)(a, delta)),
        matrix=lambda leaf: merged(jax.vmap(tap.matrix)(before(leaf))),
        description=f"{tap.description} in a scan",
    )


def _steps(tap: Tap, length: int) -> Tap:
    """The same where all steps share the kernel: (length, S, T, d) to (S, length·T, d)."""
    merged = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1])
    return dataclasses.replace(
        tap,
        output=_longer(tap.output, length),
        rows=lambda a, delta: jax.tree.map(merged, jax.vmap(tap.rows)(a, delta)),
        description=f"{tap.description} in a scan",
    )


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
        return a.reshape(1, steps, d), delta.reshape(1, steps, -1)

    def matrix(leaf: Array) -> Array:
        kernel = jnp.transpose(before(leaf), (*mine, *free))
        return kernel.reshape(1, int(np.prod(kernel.shape[: len(mine)])), -1)

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
        last = lambda x: jnp.moveaxis(x, 1, -1).reshape(1, -1, x.shape[1])
        return last(patches), last(jnp.transpose(delta, out_spec))

    def matrix(leaf: Array) -> Array:
        kernel = jnp.transpose(before(leaf), kernel_spec)
        return kernel.reshape(kernel.shape[0], -1).T[None]

    return Tap(path, 0, _output(eqn), rows, matrix, "a convolution")


_RULES = {"dot_general": _dot_general, "conv_general_dilated": _conv_general_dilated}
