"""What one step of an optimizer meets at a point: the slope, the curvature, and the scatter of both."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, MakeOptimizer
from jaxnet.curvature import LEADING, LinearOperator, Space, flattened, follow, unflattened
from jaxnet.learning_rate._forms import curvature, forms, parts_known
from jaxnet.learning_rate._response import alternating
from jaxnet.learning_rate._settled import held_in, settled
from jaxnet.learning_rate._signs import settled_signs
from jaxnet.per_example import PerExampleGradients, gradients

# Random directions for tr(RCRΣ), and for the matrices' norms; the relative accuracy of λ.
_NOISES, _PROBES, _TOLERANCE = 3, 5, 0.1
# Examples whose forms are held at once.
_AT_ONCE = 256


class Point(NamedTuple):
    """What one step of an optimizer meets at a point, for a rate of 1 and one batch size.

    With R the settled step per gradient, C the curvature, Σ the covariance of the examples' gradients and p the share
    of it that a batch keeps; pairs are a value and its standard error.

    Attributes:
      slope: g·Rg.
      along: Rg·CRg.
      noise: p tr(RCRΣ).
      largest: λ = λ_max(R^½CR^½ + D), R in answer to what alternates.
      scatter: p q, q = (E‖C_n‖² − ‖C‖²)/tr C of the examples' R^½C_nR^½, in Frobenius' norm.
      sharpest: p Var(v′R^½C_nR^½v)/λ along the sharpest direction v: the least that noise adds to λ.
      worst: p max tr(R^½C_nR^½) over the examples used: more than noise adds. NaN where C_n are Hessians, for which no
        such bound holds.
      leading: v and the two next to it, from which the next search starts; these and the next two are flat, as
        `Space.ravel` lays out what is like params.
      response: √R for a gradient that alternates, and D.
      root: √R for one that stays.
      trace: tr(R^½CR^½) by that, an estimate.
      num_gradients: the cost in gradients of the examples used; a product counts as three, a form, which goes
        forwards alone, as one and a half.
    """

    slope: Any
    along: Any
    noise: Any
    largest: Any
    scatter: Any
    sharpest: Any
    worst: Any
    leading: Any
    response: Any
    root: Any
    trace: Any
    num_gradients: Any


def noise_share(batch_size: int, n: int) -> float:
    """p: the share of the examples' covariance in a batch of B of them, drawn without replacement."""
    return (n - batch_size) / (batch_size * max(n - 1, 1))


def look(
    loss: Loss,
    make_optimizer: MakeOptimizer,
    data: Any,
    n: int,
    batch_sizes: tuple[int, ...],
    key: Array,
    params: ArrayTree,
    opt_state: Any,
    *,
    signs: bool,
) -> list[Point]:
    """What a step meets for each batch size; the search for λ starts from where the last one ended."""
    # As the operator has them, half precision widened, so that the second look compiles nothing.
    wide = contract.widened(params)
    space = Space.of(wide)
    flat, rows, points = space.ravel(wide), min(LEADING, space.size), []
    leading = jax.tree.map(lambda x: np.zeros((rows, *x.shape), x.dtype), flat)
    grads, op = gradients(loss, params, data), flattened(curvature(loss, params, data))
    for size in batch_sizes:
        share = noise_share(size, n)
        point = _look(make_optimizer, grads, op, n, share, key, leading, opt_state, signs=signs)
        leading = point.leading
        points.append(jax.tree.map(np.asarray, point._replace(leading=None)))
    return points


@functools.partial(dataset.jit, static_argnames=("make_optimizer", "signs"))
def _look(
    make_optimizer: MakeOptimizer,
    grads: PerExampleGradients,
    op: LinearOperator,
    n: Array | int,
    share: Array | float,
    key: Array,
    leading: Any,
    opt_state: Any,
    *,
    signs: bool,
) -> Point:
    loss, params, data = grads.loss, grads.params, grads.batch
    bounded = parts_known(loss)
    used, mean, variance = grads.num_examples, grads.mean(), grads.variance()
    # What the mean of these examples has too much of, beside that of all of them, wherever it is squared.
    excess = 1 / used - 1 / n
    share = share * (1 - 1 / n)  # of the unbiased covariance
    squares = jax.tree.map(lambda m, v: jnp.maximum(m * m - excess * v, 0) + share * v, mean, variance)
    if opt_state is None:
        # The mean of all examples is smaller than that of some by as much as they scatter.
        shrunk = lambda m, v: jnp.sign(m) * jnp.sqrt(jnp.maximum(m * m - excess * v, 0))
        means = jax.tree.map(shrunk, mean, variance) if signs else mean
        respond = settled_signs if signs else settled
        steady, switching, decay = respond(make_optimizer, params, squares, means)
    else:
        steady, switching, decay = held_in(make_optimizer, params, opt_state)
    # From here on vectors are flat: a program's compilation grows with what is done leaf by leaf.
    space, times = Space.of(contract.widened(params)), functools.partial(jax.tree.map, jnp.multiply)
    steady, switching, decay, slopes, variance = map(space.ravel, (steady, switching, decay, mean, variance))
    root, half = (jax.tree.map(jnp.sqrt, x) for x in (switching, steady))
    search_key, noise_key, probe_key = jax.random.split(key, 3)
    top = follow(alternating(op, root, decay), leading, _TOLERANCE, key=search_key)
    largest, vector = top.value, jax.tree.map(lambda x: x[0], top.vectors)

    step = times(steady, slopes)
    draws = jax.random.rademacher(noise_key, (_NOISES, used), dtype=jnp.result_type(float))
    weighted_sum = lambda s: space.ravel(grads.weighted_sum((s - s.mean()) / jnp.sqrt(used - 1.0)))
    noises = jax.vmap(functools.partial(times, steady))(dataset.map(weighted_sum, draws, data=data))
    # The same numbers however vectors are laid out, which depends on the number of devices.
    sign = lambda key: jax.tree.map(jnp.sign, space.flat.random(key))
    signs = jax.vmap(jax.vmap(sign))(jax.random.split(probe_key, (2, _PROBES)))
    probes, others = (jax.tree.map(lambda h, s, i=i: h * s[i], half, signs) for i in range(2))
    rows = lambda *parts: jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    one = lambda x: jax.tree.map(lambda x: x[None], x)
    first = rows(one(step), noises, one(times(root, vector)))
    pairs = (unflattened(op, rows(first, probes, last)) for last in (probes, others))
    found = forms(loss, params, data, *pairs, size=_AT_ONCE)
    along, noise, tops, traces, crossed = jnp.split(found, np.cumsum([1, _NOISES, 1, _PROBES]), axis=1)

    slope, slope_error = optax.tree.vdot(slopes, step), 2 * _error(grads.vdot(unflattened(op, step)))
    noisy = noise.mean(axis=0)
    weighted = optax.tree.vdot(steady, variance)
    # A gradient that these examples hardly resolve is not taken for less than a quarter of what they show.
    slope = jnp.maximum(slope - excess * weighted, slope / 4)
    bent = jnp.abs(along.mean())
    spread = crossed.var(axis=0, ddof=1)
    size = jnp.abs(traces.mean())
    scatter = spread.mean() / jnp.where(size > 0, size, 1)
    scatter_error = jnp.hypot(_error(spread), scatter * _error(traces.mean(axis=0))) / jnp.where(size > 0, size, 1)
    # Per unit of what alternates, noise meets what a steady gradient would: 1/(1 − β) against 1/(1 + β) for a momentum.
    ratios = jax.tree.map(lambda r, a: jnp.where(a > 0, r / jnp.where(a > 0, a, 1), 0), steady, switching)
    ratio = optax.tree.vdot(vector, times(ratios, vector))
    alone = largest - optax.tree.vdot(vector, times(decay, vector))
    return Point(
        slope=(slope, slope_error),
        along=(jnp.maximum(bent - excess * jnp.abs(noisy.mean()), bent / 4), _error(along[:, 0])),
        noise=(share * jnp.abs(noisy.mean()), share * _error(noisy)),
        largest=(largest, _error(tops[:, 0]) * jnp.sqrt(jnp.maximum(0, 1 - used / n))),
        scatter=(share * scatter, share * scatter_error),
        sharpest=share * ratio * tops.var(ddof=1) / alone,
        worst=share * jnp.maximum(traces.mean(axis=1).max(), scatter) if bounded else jnp.where(share > 0, jnp.nan, 0),
        leading=top.vectors,
        response=(root, decay),
        root=half,
        trace=size,
        num_gradients=3 * top.num_matvecs + 1.5 * found.shape[1] + 3 + 2 * _NOISES,
    )


def _error(values: Array) -> Array:
    """The standard error of a mean."""
    return values.std(ddof=1) / values.shape[0] ** 0.5


def with_errors(points: list[Point], name: str) -> tuple[np.ndarray, np.ndarray]:
    """One of the pairs, over the batch sizes."""
    values = np.array([getattr(point, name) for point in points], dtype=float)
    return values[:, 0], values[:, 1]


def greedy(points: list[Point]) -> tuple[np.ndarray, np.ndarray]:
    """g·Rg/(Rg·CRg + p tr(RCRΣ)) for each batch size, and its error."""
    (slope, d_slope), (along, d_along), (noise, d_noise) = (with_errors(points, x) for x in ("slope", "along", "noise"))
    with np.errstate(divide="ignore", invalid="ignore"):
        rate, below = slope / (along + noise), along + noise
        return rate, rate * np.sqrt((d_slope / slope) ** 2 + (d_along / below) ** 2 + (d_noise / below) ** 2)


def limits(points: list[Point]) -> tuple[np.ndarray, np.ndarray]:
    """2/(λ + p q) for each batch size, and its error."""
    (largest, d_largest), (scatter, d_scatter) = with_errors(points, "largest"), with_errors(points, "scatter")
    total = largest + scatter
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(total > 0, 2 / total, np.nan)
        return found, found * np.hypot(d_largest, d_scatter) / total
