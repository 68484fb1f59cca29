"""How far the largest eigenvalue can lie above its Ritz value, given a random start.

With the Lanczos polynomials p_j, p_j(A) q_0 = q_j, and the start's component c in the top eigenvector,
Σ_{j<=k} p_j(λ_max)² c² <= 1, and c² of a random unit vector is known in distribution. Beyond the largest Ritz value
every p_j grows, so a value x with Σ p_j(x)² > 1/w bounds λ_max with the probability that c² >= w.

Reference:
  van Dorsselaer, Hochstenbach & van der Vorst, "Computing Probabilistic Bounds for Extreme Eigenvalues of Symmetric
  Matrices with the Lanczos Method", SIMAX 2000, theorem 3.1.
"""

import math

import jax
import jax.numpy as jnp
import scipy.special
from jax import lax

from jaxnet.contract import Array

Sums = tuple[Array, Array, Array, Array]


def log_inverse_share(n: int, probability: float) -> float:
    """log 1/w for the w that c² is below with the given probability: c² ~ Beta(½, (n − 1)/2)."""
    return 0.0 if n == 1 else -math.log(scipy.special.betaincinv(0.5, (n - 1) / 2, probability))


def log_sum(x: Array, alpha: Array, beta: Array, steps: Array) -> Array:
    """log Σ_{j<=steps} p_j(x)², with β_{j+1} p_{j+1} = (x − α_{j+1}) p_j − β_j p_{j−1}, p_0 = 1.

    Args:
      x: a point at or beyond the largest Ritz value.
      alpha: (m,) diagonal of T.
      beta: (m,) below it; the last is the residual's. A 0 ends the sum: the subspace is invariant.
      steps: how many entries are filled.
    """

    def add(carry: Sums, j: Array) -> tuple[Sums, None]:
        before, now, total, log_scale = carry
        used = (j < steps) & (beta[j] > 0)
        after = ((x - alpha[j]) * now - jnp.where(j > 0, beta[j - 1], 0) * before) / jnp.where(used, beta[j], 1)
        # The polynomials overflow any float: keep them scaled, and the scale's logarithm.
        size = jnp.maximum(jnp.abs(after), 1)
        grown = (now / size, after / size, (total + after**2) / size**2, log_scale + jnp.log(size))
        return jax.tree.map(lambda a, b: jnp.where(used, a, b), grown, carry), None

    start = (jnp.zeros_like(x), jnp.ones_like(x), jnp.ones_like(x), jnp.zeros_like(x))
    (_, _, total, log_scale), _ = lax.scan(add, start, jnp.arange(alpha.shape[0]))
    return jnp.log(total) + 2 * log_scale


@jax.jit
def upper_bound(theta: Array, alpha: Array, beta: Array, steps: Array, target: float) -> Array:
    """The root x >= θ of log Σ p_j(x)² = target, by bisection; θ itself if the subspace is invariant."""
    excess = lambda width: log_sum(theta + width, alpha, beta, steps)
    # A bound below θ is disproved: the start's share was of the unlucky ones. Then assume a hundredth of what θ leaves.
    at_theta = excess(jnp.zeros_like(theta))
    goal = jnp.where(at_theta >= target, at_theta + math.log(100), target)
    unit = jnp.maximum(jnp.abs(theta), jnp.max(jnp.abs(beta))) * jnp.finfo(theta.dtype).eps
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, jnp.finfo(theta.dtype).tiny)
    too_low = lambda width: (excess(width) < goal) & jnp.isfinite(theta + width)
    width = lax.while_loop(too_low, lambda width: 2 * width, unit)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        below = excess(middle) < goal
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    width = lax.fori_loop(0, 40, halve, (jnp.zeros_like(width), width))[1]
    invariant = ((jnp.arange(alpha.shape[0]) < steps) & (beta == 0)).any()
    return jnp.where(invariant | ~jnp.isfinite(theta), theta, theta + width)
