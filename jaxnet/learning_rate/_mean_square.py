"""SGD near a minimum: the rate up to which its mean square stays bounded, and how much it bounces below."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from jaxnet import contract, dataset, losses
from jaxnet.contract import Array, ArrayTree, Loss, check_batch_size
from jaxnet.curvature import Eigensolver, LinearOperator, Space, hessian, materialize
from jaxnet.losses import MeanLoss
from jaxnet.per_example import check_independent, gradients

# The side of the largest second moment M: the search holds about sixteen of its size.
_LARGEST = 4096
# How many numbers the products of a chunk of examples with M are.
_AT_ONCE = 2**22
# At a minimum |ḡ|² is at most this share of the mean of |g_n|².
_AT_MINIMUM = 1e-6


@contract.takes_loss
@dataset.on_automatic_axes
def sgd_stability(
    loss: Loss,
    params: ArrayTree,
    batch: ArrayTree,
    batch_size: int | Sequence[int],
    *,
    replace: bool,
    gauss_newton: bool = False,
    tol: float = 1e-6,
) -> Array:
    """η* = 2/λ_max(C⁺D), the rate up to which the mean square of SGD's distance from a minimum stays bounded.

    On a quadratic loss, with independent batches, M = E[(ω − ω*)(ω − ω*)ᵀ] goes over a step into T(M) + η²pΣ with
    T(M) = M − 2ηC(M) + η²D(M), C(M) = ½(HM + MH), D(M) = (1 − p)HMH + p(1/N)Σ_n H_nMH_n, and the share p = 1/B of
    noise, or (N − B)/(B(N − 1)) without replacement. It stays bounded where ρ(T) < 1, that is for η < η*; for B = N
    without replacement η* is 2/λ_max(H). Single trajectories mostly survive rates a little beyond, where M grows by
    excursions that are rare and large.

    In H's eigenbasis C is diagonal, so that λ_max(C⁺D) is that of a symmetric matrix C^-½DC^-½ over M, found by Lanczos
    steps from M = I. The eigenvector is positive semi-definite (T preserves the order), so this start never misses it.
    M is (r, r): nothing of the size of D is formed.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the point at which the Hessians are taken; on a quadratic loss any.
      batch: N examples.
      batch_size: B from 1 to N, or several of them.
      replace: whether a batch is drawn with replacement.
      gauss_newton: take the examples' Gauss–Newton matrices in place of H_n. They are never indefinite, and equal to
        H_n for a network linear in its params, or at a point where each example's loss has no slope in the output,
        such as any network on targets that are its own outputs. M's side is then r = min(params, N · outputs), not the
        number of params, and a product costs N · outputs · r² operations: the way for large networks.
      tol: relative accuracy.

    Returns:
      The rate, or one for each B; NaN, inside a `jax.jit`, where there is none.

    Raises:
      TypeError: Gauss–Newton matrices are asked for of a loss that does not keep its two parts.
      ValueError: B is not in 1…N; the loss is no mean of independent examples; M is too large to hold; or, outside of
        a `jax.jit`, the loss is not finite, has no positive curvature, or has directions in which M grows at any rate.

    Reference:
      Mulayoff & Michaeli, "Exact Mean Square Linear Stability Analysis for SGD", COLT 2024, with its C and D;
      the notion: Ma & Ying, "On Linear Stability of SGD and Input-Smoothness of Neural Networks", NeurIPS 2021.
    """
    contract.check_tolerance(tol)
    shares = _noise_shares(batch, batch_size, replace)
    _check_start(loss, params, batch)
    found = _limits(loss, params, batch, shares, tol, blocks=_of_outputs if gauss_newton else _of_params)
    _check_found(found)
    return found.rates


@contract.takes_loss
@dataset.on_automatic_axes
def stationary_excess(
    loss: Loss, params: ArrayTree, batch: ArrayTree, batch_size: int, rate: ArrayLike, *, replace: bool
) -> Array:
    """½tr(HM) with M = T(M) + η²pΣ: by how much SGD at a constant rate stays above a minimum, on average.

    T and p are those of `sgd_stability`, Σ = (1/N) Σ g_n g_nᵀ the covariance of the examples' gradients at the minimum.
    Exact on a quadratic loss with independent batches; reshuffled epochs bounce less. By conjugate gradients on
    (2C/η − D)M = pΣ, which is positive definite below the limit.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the minimum ω*.
      batch: N examples.
      batch_size: B from 1 to N.
      rate: η, or several.
      replace: whether a batch is drawn with replacement.

    Returns:
      The expected E − E*, of the rate's shape, in units of the loss; inf from the limit on.

    Raises:
      ValueError: as `sgd_stability`; a rate is not positive and finite; or params are no minimum.

    Reference:
      Mandt, Hoffman & Blei, "Stochastic Gradient Descent as Approximate Bayesian Inference", JMLR 2017, section 3.2,
      here to all orders in η and with the noise of the curvature.
    """
    share = _noise_shares(batch, batch_size, replace)
    if not isinstance(rate, jax.core.Tracer) and not (np.isfinite(rate) & (np.asarray(rate) > 0)).all():
        raise ValueError(f"rate: expected positive and finite, got {rate}")
    _check_start(loss, params, batch)
    found, excess, mean_squared, noise = _excess(loss, params, batch, share, jnp.asarray(rate))
    _check_found(found)
    if not isinstance(noise, jax.core.Tracer) and mean_squared > _AT_MINIMUM * noise:
        raise ValueError(
            f"params: expected a minimum, but |ḡ|² = {float(mean_squared):.2g} beside a noise of {float(noise):.2g}; "
            "minimise the loss first"
        )
    return excess


class _Limits(NamedTuple):
    """What the search found.

    Attributes:
      rates: (S,) η* for each share of noise; NaN where there is none.
      smallest, largest: the ends of H's spectrum, the smallest 0 where it is so to rounding.
      flat: E|H_n v|² over H's null space, 0 where it is so to rounding.
    """

    rates: Array
    smallest: Array
    largest: Array
    flat: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The examples' matrices H_n in the eigenbasis of their mean H.

    Attributes:
      curvatures: (r,) H's eigenvalues, 0 where they are so to rounding.
      sandwich: M -> (1/N) Σ H_n M H_n for symmetric M (r, r).
    """

    curvatures: Array
    sandwich: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "data", "vectors"), meta_fields=("loss",))
@dataclasses.dataclass(frozen=True)
class _ByProducts:
    """By Hessian products of single examples, with the rows of M as vectors."""

    loss: Loss
    params: ArrayTree
    data: ArrayTree
    vectors: Array

    def __call__(self, m: Array) -> Array:
        unravel = ravel_pytree(self.params)[1]
        rotated = self.vectors @ m @ self.vectors.T

        def of_example(example: ArrayTree) -> Array:
            op = hessian(self.loss, self.params, jax.tree.map(lambda x: x[None], example))
            on_rows = jax.vmap(lambda v: ravel_pytree(op @ unravel(v))[0])
            return on_rows(on_rows(rotated).T)

        size = max(1, _AT_ONCE // m.size)
        mean = dataset.mean(lambda chunk: jax.vmap(of_example)(chunk).mean(axis=0), self.data, size=size)
        return self.vectors.T @ mean @ self.vectors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _ByFactors:
    """By factors Y_n (c, r) of H_n = Y_nᵀY_n, (N, c, r) together."""

    factors: Array

    def __call__(self, m: Array) -> Array:
        y = self.factors
        inner = jnp.einsum("ncr,ndr->ncd", y @ m, y)
        return jnp.einsum("ncr,ncs->rs", y, inner @ y) / y.shape[0]


def _of_params(loss: Loss, params: ArrayTree, data: ArrayTree) -> _Blocks:
    _check_size(sum(x.size for x in jax.tree.leaves(params)), "has a row a parameter; gauss_newton=True may need fewer")
    values, vectors = jnp.linalg.eigh(materialize(hessian(loss, params, data)))
    return _Blocks(_without_rounding(values), _ByProducts(loss, params, data, vectors))


@dataclasses.dataclass(frozen=True)
class _AlongOutputs:
    """The mean of w_n·o_n over ``(inputs, w)``: its gradient on one example is J_nᵀw_n."""

    loss: MeanLoss

    def __call__(self, params: ArrayTree, batch: Any) -> Array:
        along = self.loss.outputs(params, batch) * batch[1]
        return along.reshape(along.shape[0], -1).sum(axis=1).mean()


def _of_outputs(loss: Loss, params: ArrayTree, data: Any) -> _Blocks:
    """Of the Gauss–Newton matrices J_nᵀA_nJ_n, from the N·c rows of A_n^½J_n or, if smaller, their Gram matrix."""
    parts, _ = losses.parts_of(loss)
    outputs = parts.outputs(params, data)
    n, shape = outputs.shape[0], outputs.shape[1:]
    curved = jax.vmap(jax.hessian(lambda o, t: parts.criterion(o[None], t[None])[0]))(outputs, jnp.asarray(data[1]))
    size = outputs[0].size
    values, vectors = jnp.linalg.eigh(curved.reshape(n, size, size))
    weights = jnp.swapaxes(vectors, 1, 2) * jnp.sqrt(jnp.maximum(values, 0))[:, :, None]
    inputs, *keys = jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), (data[0], *data[2:]))
    rows = gradients(_AlongOutputs(parts), params, (inputs, weights.reshape(n * size, *shape), *keys))
    num_params = sum(x.size for x in jax.tree.leaves(params))
    _check_size(min(n * size, num_params), "has the fewer of N · outputs and params as rows; take fewer examples")
    if n * size < num_params:
        values, left = jnp.linalg.eigh(rows.gram() / n)
        values = _without_rounding(values)
        return _Blocks(values, _ByFactors((left * jnp.sqrt(n * values)).reshape(n, size, -1)))
    x = jax.vmap(lambda row: ravel_pytree(row)[0])(rows.dense())
    values, vectors = jnp.linalg.eigh(x.T @ x / n)
    return _Blocks(_without_rounding(values), _ByFactors((x @ vectors).reshape(n, size, -1)))


def _without_rounding(eigenvalues: Array) -> Array:
    """Small ones matter by their sum: only those below a rounding error go. A negative one has to be beyond doubt."""
    rounding = jnp.finfo(eigenvalues.dtype).eps * jnp.abs(eigenvalues).max()
    negative = eigenvalues < -eigenvalues.size * rounding
    return jnp.where(negative | (eigenvalues > rounding), eigenvalues, 0)


def _scale(curvatures: Array) -> Array:
    """C^-½ = (½(λ_k + λ_l))^-½ in H's eigenbasis, and 0 where H vanishes: there H_n and M play no part."""
    inside = (curvatures[:, None] > 0) & (curvatures[None, :] > 0)
    sums = (curvatures[:, None] + curvatures[None, :]) / 2
    return jnp.where(inside, 1 / jnp.sqrt(jnp.where(inside, sums, 1)), 0)


def _scaled_product(operands: tuple[_Blocks, Array], m: Array) -> Array:
    """C^-½ D C^-½ m."""
    blocks, share = operands
    scale, moment = _scale(blocks.curvatures), _scale(blocks.curvatures) * m
    mean_part = blocks.curvatures[:, None] * moment * blocks.curvatures[None, :]
    return scale * ((1 - share) * mean_part + share * blocks.sandwich(moment))


def _operator(blocks: _Blocks, share: Array) -> LinearOperator:
    r = blocks.curvatures.size
    return LinearOperator(_scaled_product, Space.of(jnp.zeros((r, r), blocks.curvatures.dtype)), (blocks, share))


def _largest(op: LinearOperator, start: Array, tol: Array | float) -> Array:
    """λ_max by Lanczos steps from a start that sees it at least as well as a random one would."""
    return Eigensolver(op.space).search(op, start, tol)[0].values[0]


def _find_limits(blocks: _Blocks, shares: Array, tol: Array | float) -> _Limits:
    values = blocks.curvatures
    smallest, largest = values.min(), values.max()
    # Where H vanishes and an example's H_n does not, M grows: there is no C to hold it.
    null = jnp.diag(jnp.where(values == 0, 1.0, 0.0).astype(values.dtype))
    identity = jnp.eye(values.size, dtype=values.dtype)
    flat, whole = (jnp.trace(blocks.sandwich(m)) for m in (null, identity))
    flat = jnp.where(flat <= 10 * values.size * jnp.finfo(values.dtype).eps * whole, 0, flat)
    # M = I, scaled.
    start = jnp.diag(jnp.sqrt(jnp.maximum(values, 0)))
    shares = shares.astype(values.dtype)
    found = lax.map(lambda share: 2 / _largest(_operator(blocks, share), start, tol), shares.ravel())
    stable = (largest > 0) & (smallest >= 0) & (flat == 0)
    return _Limits(jnp.where(stable, found, jnp.nan).reshape(shares.shape), smallest, largest, flat)


@jax.jit(static_argnames=("loss", "blocks"))
def _limits(
    loss: Loss, params: ArrayTree, data: ArrayTree, shares: Array, tol: Array | float, *, blocks: Any
) -> _Limits:
    return _find_limits(blocks(loss, params, data), shares, tol)


@jax.jit(static_argnames="loss")
def _excess(
    loss: Loss, params: ArrayTree, data: ArrayTree, share: Array, rates: Array
) -> tuple[_Limits, Array, Array, Array]:
    """The limit, the excess at each rate, |ḡ|² (0 where it is so to rounding), and the mean of |g_n|²."""
    blocks = _of_params(loss, params, data)
    values, vectors = blocks.curvatures, blocks.sandwich.vectors
    eps = jnp.finfo(values.dtype).eps
    found = _find_limits(blocks, share, 1e-6)
    rows = jax.vmap(lambda row: ravel_pytree(row)[0])(gradients(loss, params, data).dense()) @ vectors
    centred = rows - rows.mean(axis=0)
    covariance = centred.T @ centred / rows.shape[0]
    scale, op = _scale(values), _operator(blocks, share.astype(values.dtype))

    def below_limit(rate: Array) -> Array:
        shifted = lambda m: 2 / rate * m - op @ m
        m = jax.scipy.sparse.linalg.cg(shifted, share * scale * covariance, tol=10 * eps, maxiter=1000)[0]
        return jnp.vdot(values, jnp.diag(scale * m)) / 2

    at = lambda rate: jnp.where(rate < found.rates, below_limit(rate), jnp.inf)
    excess = lax.map(at, rates.astype(values.dtype).ravel()).reshape(rates.shape)
    mean_squared, noise = jnp.square(rows.mean(axis=0)).sum(), jnp.square(rows).sum(axis=1).mean()
    rounding = 10 * eps * found.largest * jnp.maximum(optax.tree.norm(params), 1)
    return (
        found,
        jnp.where(jnp.isnan(found.rates), jnp.nan, excess),
        jnp.where(mean_squared <= rounding**2, 0, mean_squared),
        noise,
    )


def _noise_shares(data: ArrayTree, batch_size: int | Sequence[int], replace: bool) -> Array:
    """p for each B."""
    dataset.check_in_memory("batch", data, "pass a sample that fits in memory")
    n = contract.num_examples(data)
    sizes = np.asarray(batch_size)
    for size in sizes.ravel().tolist():
        check_batch_size(size, n)
    return jnp.asarray(1 / sizes if replace else (n - sizes) / (sizes * max(n - 1, 1)))


def _check_size(rows: int, words: str) -> None:
    if rows > _LARGEST:
        raise ValueError(f"params: the second moment M is a matrix of {rows} rows, above {_LARGEST}; it {words}")


def _check_start(loss: Loss, params: ArrayTree, data: ArrayTree) -> None:
    contract.check_params(params)
    dtype = jnp.result_type(*jax.tree.leaves(params))
    if jnp.finfo(dtype).eps > jnp.finfo(jnp.float32).eps:
        raise TypeError(f"params: second moments need float32 or float64, got {dtype}")
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, data))):
        contract.check(loss, params, data)
        return
    check_independent(loss, params, data)
    value = loss(params, data)
    if not jnp.isfinite(value):
        raise ValueError(f"not finite: {', '.join(contract.not_finite(params=params, data=data, loss=value))}")


def _check_found(found: _Limits) -> None:
    """Raise where there is no limit, unless traced."""
    if isinstance(found.rates, jax.core.Tracer) or not jnp.isnan(found.rates).any():
        return
    smallest, largest, flat = (float(x) for x in found[1:])
    if not np.isfinite([smallest, largest]).all():
        raise ValueError("not finite: the Hessian of the loss at these params")
    if largest <= 0:
        raise ValueError(
            f"loss: its largest Hessian eigenvalue is {largest:.3g}, not positive, so no rate follows from it; "
            "is the loss flat or concave at these params?"
        )
    if smallest < 0:
        found_there = f"its Hessian's eigenvalues go from {smallest:.3g} to {largest:.3g}; along a negative one"
    else:
        found_there = f"single examples are curved where their mean is flat (mean square {flat:.2g}); there"
    raise ValueError(
        f"loss: {found_there} the mean square grows at any rate. Go to a minimum, or take the Gauss–Newton matrices, "
        "which are never negative: gauss_newton=True"
    )
