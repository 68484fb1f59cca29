"""Where each leaf of the params enters a loss, and the two factors of its gradient there.

The loss of one example is traced. A leaf that a matrix product or convolution consumes as its kernel, or a lookup as
its table, has the gradient Σ_t a_t δ_tᵀ, with the other operand's rows a and the gradient δ at the product's output. So
the trace is evaluated with a zero ε added to that output, and a recorded on the way: differentiated by ε, one backward
pass gives every leaf's a and δ. Used several times so, it has the rows of all its uses in its one sum. The trace is
followed through nested jits, rematerialisation and scans, over layers or over time; whatever else a leaf meets (another
loop, a sum, a custom derivative) is opaque.

Reference:
  Goodfellow, "Efficient Per-Example Gradient Computations", 2015; Rochette, Manoel & Tramel, "Efficient Per-Example
  Gradient Computations in Convolutional Neural Networks", 2019.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.per_example._rules import RULES, Path, Tap, View

Use = tuple[int, int]
"""A leaf by its position, and which of its uses."""
Epsilons = dict[Use, Array]
"""For each tapped use of a leaf the ε at its output."""

# Primitives that only rearrange the entries of one operand.
_REARRANGE = {"reshape", "transpose", "squeeze", "expand_dims", "copy"}
# Primitives that hold one jaxpr and mean what it means, and the parameter that holds it; 0.11 renamed the second.
_INLINE = {"jit": "jaxpr", "closed_call": "call_jaxpr", "eval_jaxpr": "call_jaxpr", "remat2": "jaxpr"}
# Those that the taps enter.
_ENTER = {**_INLINE, "scan": "jaxpr"}


@dataclasses.dataclass(frozen=True)
class Trace:
    """A loss of one example, traced.

    Attributes:
      closed: its jaxpr over params' leaves and the example's.
      taps: for each leaf of params a `Tap` for each of its uses, or words for why there is none.
    """

    closed: core.ClosedJaxpr
    taps: tuple[tuple[Tap, ...] | str, ...]

    @property
    def uses(self) -> dict[Use, Tap]:
        """Every tap."""
        found = ((i, taps) for i, taps in enumerate(self.taps) if not isinstance(taps, str))
        return {(i, j): tap for i, taps in found for j, tap in enumerate(taps)}

    def evaluate(self, leaves: list[Array], example: ArrayTree, epsilons: Epsilons) -> tuple[Array, dict[Use, Array]]:
        """The loss with ε added at the taps, and their other operands."""
        taps = self.uses

        def run(
            jaxpr: core.Jaxpr, consts: Any, arguments: Any, path: Path, epsilons: Epsilons
        ) -> tuple[list[Any], Any]:
            env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
            read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
            record: dict[Use, Array] = {}
            for index, eqn in enumerate(jaxpr.eqns):
                here, values = (*path, index), [read(v) for v in eqn.invars]
                within = {use: epsilon for use, epsilon in epsilons.items() if taps[use].path[: len(here)] == here}
                tapped = next((use for use in within if taps[use].path == here), None)
                if tapped is not None:
                    record[tapped] = values[taps[tapped].operand]
                    results = [_apply(eqn, values)[0] + epsilons[tapped]]
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
    inputs = closed.jaxpr.invars[: len(uses)]
    views = {v: _Seen(i, _dtype(v), _same) for i, v in enumerate(inputs)}
    _find(closed.jaxpr, views, (), uses)
    return Trace(closed, tuple(_together(found, v.aval.shape) for found, v in zip(uses, inputs, strict=True)))


class _Seen(NamedTuple):
    """A variable that holds a rearrangement of a leaf: which leaf, of which dtype, and how."""

    leaf: int
    dtype: Any
    view: View


def _same(x: Array) -> Array:
    return x


def _together(found: list[Tap | str], shape: tuple[int, ...]) -> tuple[Tap, ...] | str:
    taps = [use for use in found if isinstance(use, Tap)]
    if found and len(taps) == len(found) and (alike := _laid_alike(taps, shape)):
        return alike
    uses = [use if isinstance(use, str) else use.description for use in found]
    if len(uses) == 1:
        return uses[0]
    return f"used {len(found)} times: {', '.join(uses)}" if found else "not used"


def _laid_alike(taps: list[Tap], shape: tuple[int, ...]) -> tuple[Tap, ...] | None:
    """The uses as those of the first one's matrices, where theirs are these or these transposed."""
    if len(taps) == 1:
        return tuple(taps)
    if not all(tap.lookup for tap in taps):
        taps = [_by_unit_vectors(tap, shape) if tap.lookup else tap for tap in taps]
    numbered = np.arange(int(np.prod(shape))).reshape(shape)
    with jax.ensure_compile_time_eval():
        matrices = [np.asarray(tap.matrix(jnp.asarray(numbered))) for tap in taps]
    alike = []
    for tap, matrix in zip(taps, matrices, strict=True):
        if np.array_equal(matrix, matrices[0]):
            alike.append(tap)
        elif np.array_equal(np.swapaxes(matrix, 1, 2), matrices[0]) and not tap.lookup:
            alike.append(dataclasses.replace(tap, rows=functools.partial(_swapped, tap.rows)))
        else:
            return None
    return tuple(alike)


def _swapped(rows: Callable[..., tuple[Array, Array]], a: Array, delta: Array) -> tuple[Array, Array]:
    return rows(a, delta)[::-1]


def _by_unit_vectors(tap: Tap, shape: tuple[int, ...]) -> Tap:
    """A lookup as the product that it stands for."""
    d = jax.eval_shape(tap.matrix, jax.ShapeDtypeStruct(shape, jnp.float32)).shape[1]

    def rows(indices: Array, delta: Array) -> tuple[Array, Array]:
        ids, delta = tap.rows(indices, delta)
        return jax.nn.one_hot(ids[..., 0], d, dtype=delta.real.dtype), delta

    return dataclasses.replace(tap, rows=rows, lookup=False)


def _inner(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Any]:
    held = eqn.params[_ENTER[eqn.primitive.name]]
    return (held.jaxpr, held.consts) if isinstance(held, core.ClosedJaxpr) else (held, ())


def _scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """How many of a scan's operands are its constants, which come first, and how many its carry, which come next."""
    if "ft_in" in eqn.params:  # from JAX 0.11 on: a tree of consts, carry and xs
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def _find(jaxpr: core.Jaxpr, views: dict[Any, _Seen], path: Path, uses: list[list[Tap | str]]) -> list[_Seen | None]:
    """Note every use of the leaves of which ``views`` holds rearrangements; which of them the jaxpr returns."""
    for index, eqn in enumerate(jaxpr.eqns):
        held = [None if isinstance(v, core.Literal) else views.get(v) for v in eqn.invars]
        found = [seen for seen in held if seen]
        if not found:
            continue
        name, here = eqn.primitive.name, (*path, index)
        if name in _REARRANGE or (name == "broadcast_in_dim" and _size(eqn.invars[0]) == _size(eqn.outvars[0])):
            views[eqn.outvars[0]] = found[0]._replace(view=_then(found[0].view, eqn))
        elif name == "convert_element_type" and _is_a_copy(eqn, found[0]):
            views[eqn.outvars[0]] = found[0]
        elif name in _INLINE:
            inner, _ = _inner(eqn)
            passed = {v: view for v, view in zip(inner.invars, held, strict=True) if view}
            returned = _find(inner, passed, here, uses)
            views.update((v, view) for v, view in zip(eqn.outvars, returned, strict=True) if view)
        elif name == "scan":
            _find_in_scan(eqn, held, here, uses)
        else:
            rule = RULES.get(name)
            for position, seen in enumerate(held):
                if seen:
                    tap = rule(eqn, position, seen.view, here) if rule and len(found) == 1 else None
                    uses[seen.leaf].append(tap or name)
    returned = [None if isinstance(v, core.Literal) else views.get(v) for v in jaxpr.outvars]
    if not path:
        for seen in filter(None, returned):
            uses[seen.leaf].append("the loss itself")
    return returned


def _find_in_scan(eqn: core.JaxprEqn, held: list[_Seen | None], here: Path, uses: list[list[Tap | str]]) -> None:
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
        inner.invars[position]: _Seen(position, seen.dtype, _same if position >= first_scanned else seen.view)
        for position, seen in enumerate(held)
        if seen and not is_carry(position)
    }
    for returned in filter(None, _find(inner, passed, here, found)):
        found[returned.leaf].append("scan")
    for position, seen in enumerate(held):
        if seen:
            wrap = functools.partial(_layers, before=seen.view) if position >= first_scanned else _steps
            uses[seen.leaf].extend(use if isinstance(use, str) else wrap(use, length) for use in found[position])


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


def _size(v: Any) -> int:
    return int(np.prod(v.aval.shape))


def _dtype(v: Any) -> Any:
    return v.aval.dtype


def _is_a_copy(cast: core.JaxprEqn, seen: _Seen) -> bool:
    """Whether a cast hands on a leaf's entries, and the gradient by them, as they are.

    One to integers or booleans has no derivative. To complex numbers and to half precision, in which a product then
    runs, it is a copy; but what is rounded and widened again has a gradient rounded on the way, and so has what is
    rounded to eight bits or less: that is quantisation.
    """
    old, new = _dtype(cast.invars[0]), _dtype(cast.outvars[0])
    if not jnp.issubdtype(new, jnp.inexact):
        return False
    return new.itemsize >= 2 and (_within(new, old) or _within(seen.dtype, old))


def _within(few: Any, many: Any) -> bool:
    """Whether a float of the one dtype is one of the other, too."""
    few, many = jnp.finfo(few), jnp.finfo(many)
    return few.nmant <= many.nmant and few.maxexp <= many.maxexp


def _then(before: View, eqn: core.JaxprEqn) -> View:
    return lambda x: _apply(eqn, [before(x)])[0]


def _apply(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """One equation by itself, as the jaxpr that JAX knows how to evaluate."""
    given = {v: value for v, value in zip(eqn.invars, values, strict=True) if not isinstance(v, core.Literal)}
    about = core.DebugInfo("per_example", eqn.primitive.name, None, None)
    alone = core.Jaxpr((), list(given), eqn.outvars, [eqn], debug_info=about)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())
