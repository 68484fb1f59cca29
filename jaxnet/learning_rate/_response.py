"""What an optimizer's update does to a gradient, asked of the update itself.

With averages of squares held, an update is linear in the gradient, the momentum and the params, element by element.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnet.contract import Array, ArrayTree
from jaxnet.curvature import LinearOperator
from jaxnet.training import is_masked

Update = Callable[[Any, Any, Any], tuple[Any, Any]]
Linear = Callable[[Any, Any, Any], tuple[Any, Any]]


class _Fields(NamedTuple):
    """What the fields of an optax state are: momentum moves with the params, averages hardly move in a step.

    ``sums`` are those momenta that add gradients up instead of averaging.
    """

    momentum: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    squares: tuple[str, ...] = ()
    means: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    schedules: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()


# By name, since not all of them are public.
_STATES = {
    "EmptyState": _Fields(),
    "ScaleByScheduleState": _Fields(schedules=("count",)),
    "WeightDecaySchedule": _Fields(),
    "TraceState": _Fields(momentum=("trace",), sums=("trace",)),
    "ScaleByLionState": _Fields(momentum=("mu",), counts=("count",)),
    "EmaState": _Fields(momentum=("ema",), counts=("count",)),
    "ScaleByAdamState": _Fields(momentum=("mu",), squares=("nu",), counts=("count",)),
    "ScaleByAmsgradState": _Fields(momentum=("mu",), squares=("nu", "nu_max"), counts=("count",)),
    "ScaleByRssState": _Fields(squares=("sum_of_squares",), growing=("sum_of_squares",)),
    "ScaleByRmsState": _Fields(squares=("nu",)),
    "ScaleByRmsWithCountState": _Fields(squares=("nu",), counts=("count",)),
    "ScaleByRStdDevState": _Fields(squares=("nu",), means=("mu",)),
    "ScaleByRStdDevWithCountState": _Fields(squares=("nu",), means=("mu",), counts=("count",)),
}
_WRAPPERS = {
    "InjectStatefulHyperparamsState": "inner_state",
    "InjectHyperparamsState": "inner_state",
    "MaskedState": "inner_state",
    "PartitionState": "inner_states",
}


def by_role(role: str, f: Callable[..., Any], state: Any, *rest: Any) -> Any:
    """``state`` with f applied to its fields of one role, and to those of states like it."""
    name = type(state).__name__
    if isinstance(state, dict):
        return {k: by_role(role, f, x, *(other[k] for other in rest)) for k, x in state.items()}
    if name in _WRAPPERS:
        names, apply = (_WRAPPERS[name],), lambda *inner: by_role(role, f, *inner)
    elif name in _STATES:
        names, apply = getattr(_STATES[name], role), f
    elif type(state) in (tuple, list):
        return type(state)(by_role(role, f, *parts) for parts in zip(state, *rest, strict=True))
    else:
        raise TypeError(
            f"optimizer: an update with {type(state).__name__} is not known to be linear (those of momentum, of second "
            "moments like Adam's, of decay and schedules are); find where it fails by learning_rate.range_test"
        )
    return state._replace(**{n: apply(*(getattr(s, n) for s in (state, *rest))) for n in names})


def collect(role: str, state: Any) -> list[Any]:
    """The fields of one role."""
    found: list[Any] = []
    by_role(role, found.append, state)
    return found


def elements(tree: Any) -> Array:
    """All numbers of a tree in one row; a leaf may have none."""
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def filled(value: float, tree: Any) -> Any:
    """A tree of one number."""
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def frozen(update: Update, state: Any, wanted: Any, params: ArrayTree) -> Any:
    """``state`` with those averages that an update by no gradient takes to the averages of ``wanted``."""
    # Of a parameter that never had a gradient the root's derivative would be infinite.
    floor = lambda x: jnp.where(x == 0, jnp.finfo(x.dtype).tiny / jnp.finfo(x.dtype).eps, x)
    for role in ("squares", "means"):
        state = by_role(role, lambda _, x: jax.tree.map(floor, x), state, wanted)
    _, later = update(filled(0, params), state, params)
    for role in ("squares", "means"):
        state = by_role(role, lambda x, y: jax.tree.map(lambda x, y: x * (x / y), x, y), state, later)
    return state


def linearise(update: Update, frozen: Any, params: ArrayTree) -> Linear:
    """(δg, δm, δω) → (δu, δm′) about no gradient and no momentum, where averages of squares stand still.

    A number stands for a pytree filled with it. Another precision is rounded to that of the place.
    """

    def step(g: ArrayTree, momentum: list[ArrayTree], p: ArrayTree) -> tuple[ArrayTree, list[ArrayTree]]:
        given = iter(momentum)
        u, after = update(g, by_role("momentum", lambda _: next(given), frozen), p)
        return u, collect("momentum", after)

    origin = (filled(0, params), filled(0, collect("momentum", frozen)), params)
    tangent = jax.linearize(step, *origin)[1]
    rounded = lambda x, like: jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), x, like)
    tree = lambda x, like: filled(x, like) if isinstance(x, int) else rounded(x, like)
    return lambda *given: tangent(*map(tree, given, origin))


def driven(linear: Linear, z: int, gradient: int, weights: int) -> ArrayTree:
    """The update in answer to gradients, or params, that have been multiplied by z at each step for ever."""
    _, fed = linear(gradient, 0, weights)
    _, kept = linear(0, 1, 0)
    return linear(gradient, jax.tree.map(lambda c, e: c / (z - e), fed, kept), weights)[0]


def where_held(f: Callable[..., Array], held: Any, tree: ArrayTree) -> ArrayTree:
    """``tree`` with f(held, leaf) where a state that may be masked holds something like it."""
    apply = lambda place, part: part if is_masked(place) else jax.tree.map(f, place, part)
    return jax.tree.map(apply, held, tree, is_leaf=is_masked)


def check_momenta(opt_state: Any, params: ArrayTree, name: str) -> None:
    """Raise unless each parameter has one momentum at most.

    Raises:
      TypeError: one has more.
    """
    counts = jax.tree.map(lambda _: 0, params)
    for momentum in collect("momentum", opt_state):
        counts = where_held(lambda _, count: count + 1, momentum, counts)
    most = max(jax.tree.leaves(counts), default=0)
    if most > 1:
        raise TypeError(f"{name}: expected at most one momentum, got {most}; two have no limit in closed form")


def own_rate(update: Update, opt_state: Any, params: ArrayTree) -> tuple[Array, Array]:
    """η: what a steady gradient of 1 moves the params by, second moments being 1 and a sum of momentum an average.

    ε plays no part beside moments that are large, nor the correction of averages after many steps.
    """

    def at(square: float, count: int) -> ArrayTree:
        wanted = by_role("squares", lambda x: filled(square, x), opt_state)
        wanted = by_role("means", lambda x: filled(0, x), wanted)
        far = by_role("counts", lambda t: jnp.full_like(t, count), opt_state)
        linear = linearise(update, frozen(update, far, wanted, params), params)
        steady = optax.tree.scale(-(square**0.5) if collect("squares", opt_state) else -1, driven(linear, 1, 1, 0))
        none = by_role("momentum", lambda x: filled(0, x), opt_state)
        sums = collect("momentum", by_role("sums", lambda x: filled(1, x), none))
        for kept, is_sum in zip(linear(0, 1, 0)[1], sums, strict=True):
            averages = jax.tree.map(lambda e, s: 1 - s * e, kept, is_sum)
            steady = where_held(jnp.multiply, averages, steady)
        return steady

    # Twice, so that what is no root of a second moment, or not corrected yet, shows.
    rates, others = at(2.0**48, 2**30), at(2.0**44, 2**29)
    rate, seen = elements(rates).max(), elements((rates, others))
    return rate, jnp.where(seen == 0, 0, jnp.abs(seen - rate)).max()


def nonlinearity(update: Update, opt_state: Any, params: ArrayTree, grad: ArrayTree) -> Array:
    """How far the next update is from linear, element by element, in all but its second moments; relative.

    In the least precise dtype of the params, whose rounding tells what is none.
    """
    updates, after = update(grad, opt_state, params)
    # The linear part is taken about no gradient and no momentum, with the second moments that the step leads to. What a
    # linear update with those moments would do is then known before it is compared with what the optimizer does do: a
    # clip in force, or a sign, is linear about 0 and differs from that here.
    linear = linearise(update, frozen(update, opt_state, after, params), params)
    expected, _ = linear(grad, collect("momentum", opt_state), params)
    # A linear map need not be a diagonal one, which the limit assumes: the answer to a gradient of ones, times the
    # gradient, has to be the answer to the gradient. A norm's derivative, which mixes the elements, fails here.
    by_element = jax.tree.map(jnp.multiply, linear(1, 0, 0)[0], grad)
    pairs = ((updates, expected), (linear(grad, 0, 0)[0], by_element))
    apart = [optax.tree.norm(optax.tree.sub(a, b)) for a, b in pairs]
    size = optax.tree.norm(updates)
    least_precise = max((x.dtype for x in jax.tree.leaves(params)), key=lambda dtype: jnp.finfo(dtype).eps)
    return (jnp.stack(apart).max() / jnp.where(size == 0, 1, size)).astype(least_precise)


def merged(momenta: list[ArrayTree], none: ArrayTree) -> ArrayTree:
    """What momenta of several groups hold, as one tree like params; 0 where there is no momentum."""
    for momentum in momenta:
        none = where_held(lambda held, _: held, momentum, none)
    return none


def before(opt_state: Any) -> Any:
    """The state with its counts a step back, so that the next update corrects its averages as they stand."""
    return by_role("counts", lambda t: t - 1, opt_state)


def alternating(op: LinearOperator, root: ArrayTree, decay: ArrayTree) -> LinearOperator:
    """R^½ C R^½ + D: at a rate of 2 over its largest eigenvalue an update is −2x, and x alternates."""
    return LinearOperator(_alternating, op.space, (op, root, decay))


def _alternating(operands: Any, v: ArrayTree) -> ArrayTree:
    op, root, decay = operands
    curved = op @ jax.tree.map(jnp.multiply, root, v)
    return jax.tree.map(lambda r, h, d, x: r * h + d * x, root, curved, decay, v)
