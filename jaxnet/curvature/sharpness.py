"""The largest eigenvalue of the Hessian, with a bound from above."""

import dataclasses

import jax
import jax.numpy as jnp
import scipy.special
from jax import lax

from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature import lanczos
from jaxnet.curvature.eigsh import search
from jaxnet.curvature.operators import hessian


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sharpness:
    """The largest algebraic eigenvalue λ_max of the loss's Hessian.

    Attributes:
      value: θ <= λ_max, so that 2/θ is the optimistic rate.
      vector: a unit eigenvector, like params.
      residual_norm: ‖Hv − θv‖.
      upper_bound: at least λ_max with probability 1 − failure_probability, so that 2/upper_bound is safe; NaN
        after a warm start, for which the bound does not hold.
      num_matvecs: Hessian products spent.
      converged: whether θ was found to be within the tolerance.
    """

    value: Array
    vector: ArrayTree
    residual_norm: Array
    upper_bound: Array
    num_matvecs: Array
    converged: Array


def sharpness(
    loss: Loss,
    params: ArrayTree,
    batch: ArrayTree,
    *,
    key: Array,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    v0: ArrayTree | None = None,
    failure_probability: float = 0.05,
) -> Sharpness:
    """λ_max of ∂²E/∂ω∂ω′: gradient descent on E is stable at ω for rates below 2/λ_max.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point ω.
      batch: the examples that E is a mean over.
      key: a `jax.random.key` for the start vector.
      tol: relative accuracy of the value.
      max_matvecs: a limit on the Hessian products; by default enough for any gap that the dtype resolves.
      v0: a start vector like params, such as the eigenvector at a point nearby.
      failure_probability: δ of ``upper_bound``, over the random start.

    Returns:
      A `Sharpness`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract, or a number is out of range.

    Reference:
      LeCun, Simard & Pearlmutter, "Automatic Learning Rate Maximization by On-Line Estimation of the Hessian's
      Eigenvectors", NIPS 1992; the bound: van Dorsselaer, Hochstenbach & van der Vorst, SIMAX 2000, theorem 3.1.
    """
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability: expected a number in (0, 1), got {failure_probability}")
    op = hessian(loss, params, batch)
    start = lanczos.random_like(key, op.params) if v0 is None else v0
    pairs, end = search(op, start, key, tol, k=1, which="LA", max_matvecs=max_matvecs)
    n = sum(x.size for x in jax.tree.leaves(op.params))
    value = pairs.values[0]
    if v0 is None:
        # The share c² of a random unit vector in one eigenvector is Beta(½, (n−1)/2); one number is all of it.
        share = float(scipy.special.betaincinv(0.5, (n - 1) / 2, failure_probability)) if n > 1 else 1.0
        upper = _upper_bound(value, end.alpha, end.beta, end.num_matvecs, share)
    else:
        upper = jnp.full_like(value, jnp.nan)
    vector = jax.tree.map(lambda x: x[0], pairs.vectors)
    return Sharpness(value, vector, pairs.residual_norms[0], upper, pairs.num_matvecs, pairs.converged)


@jax.jit
def _upper_bound(theta: Array, alpha: Array, beta: Array, steps: Array, share: float) -> Array:
    """The root λ >= θ of Σ_{j<=k} p_j(λ)² = 1/share, with Lanczos polynomials p_j, by bisection.

    Each p_j is increasing beyond the largest Ritz value, so there is one root. A β of 0 ends the recurrence: the
    subspace is invariant, and θ is the eigenvalue.
    """
    m = alpha.shape[0]
    target = -jnp.log(jnp.asarray(share, theta.dtype))

    def log_sum(x: Array) -> Array:
        # p_j scaled by a running factor, whose logarithm is kept: the polynomials overflow any float.
        def add(carry: tuple[Array, ...], j: Array) -> tuple[tuple[Array, ...], None]:
            before, now, total, log_scale = carry
            used = (j < steps) & (beta[j] > 0)
            after = ((x - alpha[j]) * now - jnp.where(j > 0, beta[j - 1], 0) * before) / jnp.where(used, beta[j], 1)
            size = jnp.maximum(jnp.abs(after), 1)
            grown = (now / size, after / size, (total + after**2) / size**2, log_scale + jnp.log(size))
            return jax.tree.map(lambda a, b: jnp.where(used, a, b), grown, carry), None

        start = (jnp.zeros_like(x), jnp.ones_like(x), jnp.ones_like(x), jnp.zeros_like(x))
        (_, _, total, log_scale), _ = lax.scan(add, start, jnp.arange(m))
        return jnp.log(total) + 2 * log_scale

    def double(width: Array) -> Array:
        return 2 * width

    unit = jnp.maximum(jnp.abs(theta), jnp.max(jnp.abs(beta))) * jnp.finfo(theta.dtype).eps
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, jnp.finfo(theta.dtype).tiny)
    # A bound below θ is disproved: the start's share was of the unlucky δ. Then assume a hundredth of what θ leaves.
    target = jnp.maximum(target, jnp.where(log_sum(theta) >= target, log_sum(theta) + jnp.log(100.0), target))
    too_low = lambda width: (log_sum(theta + width) < target) & jnp.isfinite(theta + width)
    width = lax.while_loop(too_low, double, unit)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        below = log_sum(middle) < target
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    upper = lax.fori_loop(0, 40, halve, (theta, theta + width))[1]
    # A breakdown in the first cycle: the random start's whole Krylov space was seen.
    invariant = ((jnp.arange(m) < steps) & (beta == 0)).any()
    return jnp.where(invariant | ~jnp.isfinite(theta), theta, upper)
