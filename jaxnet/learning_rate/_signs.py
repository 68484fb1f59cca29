"""Optimizers that step by the sign of an average of gradients: what they do on average where gradients are noisy."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.scipy.special import erf

from jaxnet.contract import Array, ArrayTree, MakeOptimizer
from jaxnet.learning_rate._response import Update, by_role, collect, elements, filled, merged
from jaxnet.learning_rate._settled import SMALL, Response, after_long, at_height, unit

# Halvings of an interval in which the momentum's weight beside the gradient's lies.
_HALVINGS, _LARGEST = 60, 1e6


class _Step(NamedTuple):
    """A step −s·sign(c), c = g + b m with m' = ρm + αg, element by element; each like params.

    Attributes:
      size: s, for a rate of 1.
      resolution: c's mean over its standard deviation, where a gradient's are one.
      turned: c's answer to a gradient that alternates over that to one that stays.
      decay: the step towards 0 per unit of the params.
    """

    size: ArrayTree
    resolution: ArrayTree
    turned: ArrayTree
    decay: ArrayTree


def takes_sign(make_optimizer: MakeOptimizer, params: ArrayTree) -> bool:
    """Whether a maker's update asks for nothing but the signs of gradients, and remembers none of its own steps.

    Whatever the sizes of gradients, below what a clip cuts too, and at the next step again, it is then the same; and
    by no gradient it is in proportion to the params.
    """
    # Two gradients, all of whose elements are positive and differ.
    slow, fast = (_wavy(params, frequency) for frequency in (0.7, 1.9))
    return bool(_takes_sign(make_optimizer, params, slow, fast))


@jax.jit(static_argnums=0)
def _takes_sign(make_optimizer: MakeOptimizer, params: ArrayTree, slow: ArrayTree, fast: ArrayTree) -> Array:
    update, held = _at_its_height(make_optimizer, params)
    none = filled(0, params)

    def stepped(gradient: ArrayTree) -> tuple[Array, Array]:
        first, state = update(gradient, held, none)
        # With a schedule where it was.
        state = by_role("schedules", lambda _, before: before, state, held)
        return elements(first), elements(update(gradient, state, none)[0])

    updates = jnp.stack([*stepped(optax.tree.scale(SMALL, slow)), *stepped(fast)])
    one, two = (elements(update(none, held, filled(times, params))[0]) for times in (1, 2))
    down = (updates[0].max() <= 0) & (updates[0].min() < 0)
    return (updates == updates[0]).all() & jnp.allclose(2 * one, two) & down


def _wavy(params: ArrayTree, frequency: float) -> ArrayTree:
    count = itertools.count(1)
    wave = lambda x: [1.1 + math.sin(frequency * next(count)) for _ in range(x.size)]
    return jax.tree.map(lambda x: np.reshape(np.asarray(wave(x), x.dtype), x.shape), params)


def _at_its_height(make_optimizer: MakeOptimizer, params: ArrayTree) -> tuple[Update, Any]:
    """The update for a rate of 1, and its state after long, at the height of its schedule."""
    optimizer, update = unit(make_optimizer)
    return update, at_height(update, after_long(optimizer, params), params)


def settled_signs(make_optimizer: MakeOptimizer, params: ArrayTree, squares: ArrayTree, means: ArrayTree) -> Response:
    """What an optimizer that takes signs does on average, by gradients that are normal with the moments given.

    With κ its average's mean over the average's deviation, E[sign] = erf(κ/√2), so R = s erf(κ/√2)/ḡ: the statistical
    linearisation, in which noise smooths the sign. Without noise R = s/|ḡ|. The smallest |ḡ| are rounding, and none is
    taken for less than a thousandth of its root mean square.

    Args:
      make_optimizer: one that `takes_sign`, called with a rate of 1.
      params: the point.
      squares: E[g²].
      means: E[g].
    """
    step = _step(make_optimizer, params)
    count = sum(x.size for x in jax.tree.leaves(params))
    least_mean = 1e-3 * optax.tree.norm(means) / count**0.5

    def gain(size: Array, resolution: Array, square: Array, mean: Array) -> Array:
        deviation = jnp.sqrt(jnp.maximum(square - mean * mean, 0))
        noisy, moved = deviation > 0, mean != 0
        per_unit = resolution / jnp.where(noisy, deviation, 1)
        least = jnp.sqrt(2 / jnp.pi) * per_unit
        smoothed = erf(mean * per_unit / jnp.sqrt(2.0)) / jnp.where(moved, mean, 1)
        # erf(x)/x by rounded x is lost where x is next to nothing.
        smoothed = jnp.where(jnp.abs(mean) * per_unit > 1e-3, smoothed, least)
        sharp = jnp.where(moved, 1 / jnp.maximum(jnp.abs(mean), jnp.where(moved, least_mean, 1)), 0)
        return size * jnp.where(noisy, smoothed, sharp)

    steady = jax.tree.map(gain, step.size, step.resolution, squares, means)
    return Response(steady, jax.tree.map(jnp.multiply, steady, step.turned), step.decay)


def _step(make_optimizer: MakeOptimizer, params: ArrayTree) -> _Step:
    """A sign's step, asked of the update itself: where its sign turns tells how momentum and gradient are weighed."""
    of_state, held = _at_its_height(make_optimizer, params)
    none = filled(0, params)

    def update(g: ArrayTree, momentum: float, p: ArrayTree) -> tuple[ArrayTree, list[ArrayTree]]:
        updates, after = of_state(g, by_role("momentum", lambda m: filled(momentum, m), held), p)
        return updates, collect("momentum", after)

    down, fed = update(filled(1, params), 0.0, none)
    kept = update(none, 1.0, none)[1]

    # A momentum of 1 outweighs a gradient of −t for t < b.
    def halve(_: Array, ends: tuple[ArrayTree, ArrayTree]) -> tuple[ArrayTree, ArrayTree]:
        middle = jax.tree.map(lambda a, b: (a + b) / 2, *ends)
        turned = update(optax.tree.scale(-1, middle), 1.0, none)[0]
        down = jax.tree.map(lambda u: u < 0, turned)
        return jax.tree.map(jnp.where, down, middle, ends[0]), jax.tree.map(jnp.where, down, ends[1], middle)

    weight, _ = lax.fori_loop(0, _HALVINGS, halve, (none, filled(_LARGEST, params)))
    alpha, rho = (merged(momenta, none) for momenta in (fed, kept))
    # c_t = g_t + bα Σ ρᵏ g_{t−1−k}.
    steady = jax.tree.map(lambda b, a, r: 1 + b * a / (1 - r), weight, alpha, rho)
    alternating = jax.tree.map(lambda b, a, r: 1 - b * a / (1 + r), weight, alpha, rho)
    spread = jax.tree.map(lambda b, a, r: jnp.sqrt(1 + (b * a) ** 2 / (1 - r * r)), weight, alpha, rho)
    ratio = lambda x, y: jax.tree.map(jnp.divide, x, y)
    return _Step(
        size=optax.tree.scale(-1, down),
        resolution=ratio(steady, spread),
        # A momentum that outweighs the gradient answers an alternating one against it, which does not make it grow.
        turned=jax.tree.map(lambda x: jnp.maximum(x, 0), ratio(alternating, steady)),
        decay=optax.tree.scale(-1, update(none, 0.0, filled(1, params))[0]),
    )
