"""How far an extreme eigenvalue can lie beyond its Ritz value, given a random start.

With the Lanczos polynomials p_j, p_j(A) q_0 = q_j, and the start's component c in the eigenvector of λ,
Σ_{j<=k} p_j(λ)² c² <= 1, and c² of a random unit vector is known in distribution. Beyond the outermost Ritz values
every p_j grows, so a point x there with Σ p_j(x)² > 1/w bounds λ_max with the probability that c² >= w.

The sum needs no recurrence. The Ritz values θ_i are the roots of p_k, p_k(x) = Π (x − θ_i)/Π β_j, and from
(xI − T) p = β_k p_k e follows Σ_{j<=k} p_j² = p_k² (1 + Σ (r_i/(x − θ_i))²) with the residuals r_i. A thick restart
replaces the basis by Ritz vectors, which are polynomials in A as well: the roots that it discards remain factors of
p_k, those that it keeps are among the next Ritz values, and so the bound holds through any number of restarts.

Reference:
  van Dorsselaer, Hochstenbach & van der Vorst, "Computing Probabilistic Bounds for Extreme Eigenvalues of Symmetric
  Matrices with the Lanczos Method", SIMAX 2000, theorem 3.1 (without restarts).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import scipy.special
from jax import lax

from jaxnet.contract import Array


class Polynomials(NamedTuple):
    """The Lanczos polynomials of a start, by their roots.

    Attributes:
      values: (m,) Ritz values of the basis.
      residual_norms: (m,) r_i.
      filled: (m,) which of them are filled.
      discarded: (room,) Ritz values that restarts have discarded.
      num_discarded: how many; beyond the room nothing can be said.
      log_betas: Σ log β_j; −inf once the subspace was invariant.
    """

    values: Array
    residual_norms: Array
    filled: Array
    discarded: Array
    num_discarded: Array
    log_betas: Array


def log_inverse_share(n: int, probability: float) -> float:
    """log 1/w for the w that c² is below with the given probability: c² ~ Beta(½, (n − 1)/2)."""
    return 0.0 if n == 1 else -math.log(scipy.special.betaincinv(0.5, (n - 1) / 2, probability))


def log_sum(p: Polynomials, x: Array) -> Array:
    """log Σ_{j<=k} p_j(x)² at a point x beyond all Ritz values, above or below; inf where the subspace is invariant.

    −inf, which excludes nothing, where more Ritz values were discarded than there is room for.
    """
    distance = jnp.abs(x - p.values)
    factors = jnp.sum(jnp.where(p.filled, jnp.log(distance), 0))
    past = jnp.arange(p.discarded.shape[0]) < p.num_discarded
    factors += jnp.sum(jnp.where(past, jnp.log(jnp.abs(x - p.discarded)), 0))
    others = jnp.sum(jnp.where(p.filled, (p.residual_norms / distance) ** 2, 0))
    known = 2 * (factors - p.log_betas) + jnp.log1p(others)
    known = jnp.where(p.num_discarded > p.discarded.shape[0], -jnp.inf, known)
    return jnp.where(jnp.isneginf(p.log_betas), jnp.inf, known)


def upper_bound(p: Polynomials, theta: Array, target: Array | float) -> Array:
    """The root x > θ of log Σ p_j(x)² = target, by bisection; θ itself if the subspace is invariant."""
    excess = lambda width: log_sum(p, theta + width)
    scale = jnp.maximum(jnp.abs(theta), jnp.max(p.residual_norms))
    unit = 4 * jnp.finfo(theta.dtype).eps * scale
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, jnp.finfo(theta.dtype).tiny)
    # A bound below θ is disproved: the start's share was of the unlucky ones. Then assume a hundredth of what θ leaves.
    at_theta = excess(unit)
    goal = jnp.where(at_theta >= target, at_theta + math.log(100), target)
    too_low = lambda width: (excess(width) < goal) & jnp.isfinite(theta + width)
    width = lax.while_loop(too_low, lambda width: 2 * width, unit)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        below = excess(middle) < goal
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    width = lax.fori_loop(0, 40, halve, (jnp.zeros_like(width), width))[1]
    return jnp.where(jnp.isneginf(p.log_betas) | ~jnp.isfinite(theta), theta, theta + width)
