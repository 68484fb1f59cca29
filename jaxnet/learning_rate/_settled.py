"""What an optimizer does once it has settled, and whether it is one of those of which that is known."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet.contract import Array, ArrayTree, MakeOptimizer
from jaxnet.learning_rate._response import (
    Linear,
    Update,
    before,
    by_role,
    check_momenta,
    collect,
    driven,
    elements,
    filled,
    frozen,
    linearise,
    merged,
    nonlinearity,
)
from jaxnet.training import is_masked

# Steps after which an average has settled, and before which a schedule is looked for at its height; a gradient that no
# clip cuts.
_LONG, _SCHEDULED, SMALL = 2**30, 2**20, 2.0**-40


def unit(make_optimizer: MakeOptimizer, grad: ArrayTree | None = None) -> tuple[Any, Update]:
    """The optimizer for a rate of 1, and its update, which is told that the gradient is ``grad``."""
    optimizer = optax.with_extra_args_support(make_optimizer(1.0))
    told = lambda g: g if grad is None else grad
    return optimizer, lambda g, state, p: optimizer.update(g, state, p, value=jnp.zeros(()), grad=told(g))


def after_long(optimizer: Any, params: ArrayTree) -> Any:
    """A state in which averages are corrected for good, of second moments of 1."""
    state = by_role("counts", lambda t: jnp.full_like(t, _LONG), optimizer.init(params))
    return by_role("squares", lambda x: filled(1, x), state)


class Response(NamedTuple):
    """What an update does for a rate of 1, element by element, each like params.

    Attributes:
      steady: the step down a gradient that stays, R.
      alternating: the step down one that changes its sign at each step, when momentum cancels.
      decay: the step towards 0 per unit of the params, as they alternate.
    """

    steady: ArrayTree
    alternating: ArrayTree
    decay: ArrayTree


class Recursion(NamedTuple):
    """u = −R(a g + w m), m ← ρm + g, with R the step for a gradient that stays, so that a + w/(1 − ρ) = 1."""

    a: Array
    w: Array
    rho: Array


def recursion(make_optimizer: MakeOptimizer, params: ArrayTree) -> Recursion | None:
    """How an optimizer weighs gradient and momentum; None if it does not do so alike for all of the params."""
    least, largest = jax.device_get(_recursions(make_optimizer, params))
    alike = all(float(high - low) <= 1e-3 for low, high in zip(least, largest, strict=True))
    return largest if alike else None


@jax.jit(static_argnums=0)
def _recursions(make_optimizer: MakeOptimizer, params: ArrayTree) -> tuple[Recursion, Recursion]:
    """The least and the largest of each number, over the params that are trained."""
    optimizer, update = unit(make_optimizer, filled(0, params))
    held = at_height(update, after_long(optimizer, params), params)
    linear = linearise(update, held, params)
    none = filled(0, params)
    (now, fed), (remembered, kept) = linear(1, 0, 0), linear(0, 1, 0)
    alpha, rho = merged(fed, none), merged(kept, none)
    later = jax.tree.map(jnp.multiply, remembered, alpha)
    steady = jax.tree.map(lambda a, w, r: a + w / (1 - r), now, later, rho)
    over = lambda tree: jax.tree.map(lambda x, s: x / jnp.where(s == 0, 1, s), tree, steady)
    parts = over(now), over(later), rho

    def extreme(f: Callable[..., Array], otherwise: float) -> Recursion:
        # What is not trained has no part in it.
        return Recursion(*(f(jnp.where(elements(steady) == 0, otherwise, elements(tree))) for tree in parts))

    return extreme(jnp.min, jnp.inf), extreme(jnp.max, -jnp.inf)


def settled(make_optimizer: MakeOptimizer, params: ArrayTree, squares: ArrayTree, means: ArrayTree) -> Response:
    """The response of an optimizer whose averages have settled, at the greatest value of its schedule.

    Args:
      make_optimizer: called with a rate of 1; its update is taken to be in proportion to the rate.
      params: the point.
      squares: E[g²], what the second moments average.
      means: E[g].
    """
    optimizer, update = unit(make_optimizer, means)
    fresh = optimizer.init(params)
    state = by_role("counts", lambda t: jnp.full_like(t, _LONG), fresh)
    averages = by_role("means", lambda x: _placed(x, means), by_role("squares", lambda x: _placed(x, squares), state))
    held = at_height(update, frozen(update, state, averages, params), params)
    parts = _parts(linearise(update, held, params))
    if collect("squares", fresh):
        # A parameter that no example moves has no scale, and no part in any step.
        parts = jax.tree.map(lambda r, s: jnp.where(s > 0, r, 0), parts, Response(*(squares,) * 3))
    return parts


def held_in(make_optimizer: MakeOptimizer, params: ArrayTree, opt_state: Any) -> Response:
    """The response of an optimizer in a state, its averages of squares held, a schedule where it stands."""
    _, update = unit(make_optimizer)
    if optax.tree.get_all_with_path(opt_state, "learning_rate", lambda _, x: hasattr(x, "dtype")):
        opt_state = optax.tree.set(opt_state, learning_rate=jnp.ones(()))
    return _parts(linearise(update, frozen(update, before(opt_state), opt_state, params), params))


def _parts(linear: Linear) -> Response:
    steady, alternating, decay = driven(linear, 1, 1, 0), driven(linear, -1, 1, 0), driven(linear, -1, 0, 1)
    return Response(*optax.tree.scale(-1, (steady, alternating, decay)))


def at_height(update: Update, state: Any, params: ArrayTree) -> Any:
    """The state with its schedules where they let through the most."""
    if not collect("schedules", state):
        return state
    at = lambda count: by_role("schedules", lambda t: jnp.full_like(t, count), state)
    counts = jnp.append(0, 2 ** jnp.arange(_SCHEDULED.bit_length()))
    # By no weights, which decay would move, and within what a clip lets through.
    one, none = filled(SMALL, params), filled(0, params)
    height = lambda count: jnp.abs(elements(update(one, at(count), none)[0])).max()
    return at(counts[lax.map(height, counts).argmax()])


def at_constant_rate(make_optimizer: MakeOptimizer, rate: Array) -> optax.GradientTransformation:
    """An optimizer whose update is in proportion to its rate, with its schedules held at their height.

    Made with a rate of 1 and scaled, since not every schedule of optax takes a rate that is traced.
    """
    optimizer, response = unit(make_optimizer)

    def init(params: ArrayTree) -> Any:
        found = iter(collect("schedules", at_height(response, after_long(optimizer, params), params)))
        return by_role("schedules", lambda _: next(found), optimizer.init(params))

    def update(updates: ArrayTree, state: Any, params: ArrayTree | None = None, **others: Any) -> tuple[ArrayTree, Any]:
        counts = iter(collect("schedules", state))
        updates, state = optimizer.update(updates, state, params, **others)
        return optax.tree.scale(rate, updates), by_role("schedules", lambda _: next(counts), state)

    return optax.GradientTransformationExtraArgs(init, update)


def _placed(places: Any, values: ArrayTree) -> Any:
    """``values`` where a state that may be masked holds something like them."""
    return jax.tree.map(lambda place, value: place if is_masked(place) else value, places, values, is_leaf=is_masked)


def check_maker(make_optimizer: MakeOptimizer, params: ArrayTree) -> None:
    """Raise unless each part of a maker's optimizer is known, and its averages settle.

    Raises:
      TypeError: it is no maker; a part of its optimizer is not known; a parameter has two momenta; or squares add up.
    """
    if not callable(make_optimizer):
        raise TypeError(f"make_optimizer: expected a maker such as optax.adam, got {type(make_optimizer).__name__}")
    fresh = jax.eval_shape(lambda: make_optimizer(1.0).init(params))
    check_momenta(fresh, params, "make_optimizer")
    if collect("growing", fresh):
        raise TypeError("make_optimizer: its sum of squares grows for ever and never settles; use range_test")


def check_proportional(make_optimizer: MakeOptimizer, params: ArrayTree) -> None:
    """Raise unless a maker's update is in proportion to its rate and to a small gradient.

    Raises:
      TypeError: it answers no small gradient, goes up it, or divides by a norm or by something else than the root of a
        second moment.
    """
    name = getattr(make_optimizer, "__name__", "its optimizer")
    least, largest, nonlinear, ratios = jax.device_get(_tried(make_optimizer, params))
    if not largest > 0 or least < 0:
        raise TypeError(
            f"make_optimizer: {name} does not step down a small gradient (is its rate 0?); "
            "find a rate by learning_rate.range_test"
        )
    if not nonlinear <= float(jnp.finfo(nonlinear.dtype).eps) ** 0.5:
        raise TypeError(
            f"make_optimizer: {name} is not linear in the gradient (does it divide by a norm?); use range_test"
        )
    for ratio in map(float, ratios):
        # 1 without second moments, 2 by their root, 0/0 where nothing is trained.
        if not (abs(ratio - 1) < 1e-2 or abs(ratio - 2) < 1e-2 or ratio != ratio):
            raise TypeError(f"make_optimizer: {name} does not divide by the root of a second moment; use range_test")


@jax.jit(static_argnums=0)
def _tried(make_optimizer: MakeOptimizer, params: ArrayTree) -> tuple[Array, Array, Array, list[Array]]:
    """The least and the largest step; how far one by next to no gradient is from linear; and each leaf's step beside
    second moments of one size over that beside four times as large ones.
    """
    zeros = filled(0, params)
    small, large = (
        settled(make_optimizer, params, filled(square, params), zeros).steady for square in (2.0**40, 2.0**42)
    )
    optimizer, update = unit(make_optimizer, zeros)
    state = after_long(optimizer, params)
    # Of length 1/1000: below what a clip cuts, above what a norm is kept from.
    length = optax.tree.norm(filled(1, params))
    nonlinear = nonlinearity(update, state, params, optax.tree.scale(1e-3 / length, filled(1, params)))
    return (
        elements(small).min(),
        elements(small).max(),
        nonlinear,
        [a.max() / b.max() for a, b in zip(*map(jax.tree.leaves, (small, large)), strict=True) if a.size],
    )
