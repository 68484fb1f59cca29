"""Slices of the loss's landscape through a point, along one or two directions."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature._hessian import chosen, hessian


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Landscape:
    """The loss on a line or a plane through ω, and its quadratic model along each direction.

    Attributes:
      coordinates: (P,) how far along each direction, in units of its length.
      losses: (P,) E(ω + a_i d), or (P, P) E(ω + a_i d₀ + a_j d₁).
      centre: E(ω).
      slopes: (k,) g·d.
      curvatures: (k,) d·Hd, of a unit eigenvector its eigenvalue.
    """

    coordinates: Array
    losses: Array
    centre: Array
    slopes: Array
    curvatures: Array

    @property
    def parabolas(self) -> Array:
        """(k, P) E(ω) + a g·d + ½a² d·Hd along each direction: what curvature at ω alone foresees."""
        a = self.coordinates
        return self.centre + self.slopes[:, None] * a + 0.5 * self.curvatures[:, None] * a**2


@contract.takes_loss
def landscape(
    loss: Loss, params: ArrayTree, batch: Any, directions: ArrayTree, *, extent: float = 1.0, num_points: int = 41
) -> Landscape:
    """E along one direction, E(ω + a d), or on the plane of two, E(ω + a d₀ + b d₁), for a and b in ±extent.

    One compiled program evaluates point after point, in the memory of one evaluation. Along the leading eigenvectors
    (``eigsh(...).vectors``, ``sharpness(...).vector``) it shows how far the parabola of curvature λ holds; along
    `filter_normalised` directions how wide the valley is beside the weights' own size.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point ω.
      batch: the examples; or a data set in batches, gone through three times, or four for a plane, whatever the number
        of points.
      directions: one, like params; or one or two with a leading axis, leaves (1, ...) or (2, ...).
      extent: how far to go each way, in units of the directions' lengths.
      num_points: P, on each axis; where it is odd, the middle one is ω.

    Returns:
      A `Landscape`, which `jaxnet.plot` draws: a line beside its parabola, or contours.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract, or there are more than two directions.

    Reference:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, sections 3 and 4.
    """
    if not 0 < extent < float("inf"):
        raise ValueError(f"extent: expected a positive and finite number, got {extent}")
    contract.check_count("num_points", num_points, 2)
    op = hessian(loss, params, batch)
    num_axes = [jnp.ndim(x) for x in jax.tree.leaves(directions)]
    if num_axes == [len(shape) for shape in op.space.shapes]:
        directions = jax.tree.map(lambda x: jnp.asarray(x)[None], directions)
    leading = {jnp.shape(x)[0] if jnp.ndim(x) else None for x in jax.tree.leaves(directions)}
    if leading not in ({1}, {2}):
        raise ValueError(
            "directions: expected one like params, or one or two with a leading axis, got leaves of shapes "
            f"{[jnp.shape(x) for x in jax.tree.leaves(directions)]}; of more, take x[:2] of each leaf x"
        )
    op.space.check("directions", jax.tree.map(lambda x: x[0], directions))
    return _landscape(loss, op, directions, extent, num_points)


@functools.partial(dataset.jit, static_argnames=("loss", "num_points"))
def _landscape(loss: Loss, op: Any, directions: ArrayTree, extent: Array | float, num_points: int) -> Landscape:
    op, _ = chosen(op)
    params, data = op.operands
    directions = jax.tree.map(lambda d, p: jnp.asarray(d, p.dtype), directions, params)
    count = jax.tree.leaves(directions)[0].shape[0]
    coordinates = jnp.linspace(-extent, extent, num_points, dtype=jnp.result_type(*jax.tree.leaves(params)))
    grid = jnp.stack(jnp.meshgrid(*[coordinates] * count, indexing="ij"), axis=-1)
    losses = dataset.mean(_AtPoints(loss), data, params, directions, grid.reshape(-1, count))
    centre, gradient = dataset.mean(contract.ValueAndGrad(loss), data, params)
    along = lambda of: dataset.map(of, directions, data=data)
    return Landscape(
        coordinates=coordinates,
        losses=losses.reshape(grid.shape[:-1]),
        centre=centre,
        slopes=along(lambda d: optax.tree.vdot(gradient, d)),
        curvatures=along(lambda d: optax.tree.vdot(d, op @ d)),
    )


@dataclasses.dataclass(frozen=True)
class _AtPoints:
    """E(ω + Σ a_i d_i) on a batch, for rows a (P, k)."""

    loss: Loss

    def __call__(self, batch: Any, params: ArrayTree, directions: ArrayTree, points: Array) -> Array:
        batch = contract.widened(batch)

        def at(point: Array) -> Array:
            moved = lambda p, d: p + jnp.tensordot(point.astype(p.dtype), d, axes=1)
            return jnp.asarray(self.loss(jax.tree.map(moved, params, directions), batch))

        return lax.map(at, points)


def filter_normalised(params: ArrayTree, *, key: Array, count: int = 2, axis: int = -1) -> ArrayTree:
    """Random directions d whose every filter is as long as the weights' own: d_ij ← d_ij ‖w_ij‖/‖d_ij‖.

    A filter is what makes one output of a layer, one entry along a kernel's axis of outputs. Leaves of fewer than two
    axes, biases and scales, are held: there d is 0.

    Args:
      params: the point.
      key: a `jax.random.key`.
      count: how many directions.
      axis: the kernels' axis of outputs: the last one of `jaxnet.nn`, Flax and Haiku, the first (0) of Equinox.

    Returns:
      Like params, leaves (count, ...); for `landscape`, with an extent of 1 or less.

    Raises:
      TypeError, ValueError: the params are no floating arrays, there is no kernel, or one has no such axis.

    Reference:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, section 4.
    """
    contract.check_params(params)
    leaves, structure = jax.tree.flatten(params)
    fewest = min((jnp.ndim(x) for x in leaves if jnp.ndim(x) > 1), default=0)
    if not fewest:
        raise ValueError("params: expected a kernel, a leaf of two axes or more, to take filters of")
    if not -fewest <= axis < fewest:
        raise ValueError(f"axis: expected one that each kernel has, the least of {fewest} axes, got {axis}")
    keys = jax.random.split(key, len(leaves))

    def draw(key: Array, w: Array) -> Array:
        w = jnp.asarray(w)
        if w.ndim < 2:
            return jnp.zeros((count, *w.shape), w.dtype)
        wide = jnp.promote_types(w.dtype, jnp.float32)
        d = jax.random.normal(key, (count, *w.shape), wide)
        within = tuple(i for i in range(-w.ndim, 0) if i != (axis if axis < 0 else axis - w.ndim))
        length = lambda x: jnp.sqrt(jnp.sum(x.astype(wide) ** 2, axis=within, keepdims=True))
        return (d * (length(w) / length(d))).astype(w.dtype)

    return jax.tree.unflatten(structure, [draw(key, w) for key, w in zip(keys, leaves, strict=True)])
