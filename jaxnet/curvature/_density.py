"""How the eigenvalues of an operator are spread, from a few random vectors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import erf

from jaxnet import contract, dataset
from jaxnet.contract import Array
from jaxnet.curvature import _lanczos
from jaxnet.curvature._operators import LinearOperator, check_one_batch, flattened


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpectralDensity:
    """The mean over random probes of measures Σ_i w_i δ(x − θ_i), each of mass 1.

    Attributes:
      nodes: (probes, steps) the Ritz values θ of each probe.
      weights: (probes, steps) w, the squared first components of T's eigenvectors.
      num_matvecs: products spent.
    """

    nodes: Array
    weights: Array
    num_matvecs: int = dataclasses.field(metadata={"static": True})

    def density(self, points: Array, width: Array | float) -> tuple[Array, Array]:
        """The density at ``points`` smoothed by a Gaussian of standard deviation ``width``, and its standard error.

        Returns:
          Two arrays of the points' shape, the mean over probes and its standard error.
        """
        z = (jnp.asarray(points)[..., None, None] - self.nodes) / width
        return self._over_probes(jnp.exp(-(z**2) / 2) / (width * jnp.sqrt(2 * jnp.pi)))

    def cumulative(self, points: Array, width: Array | float) -> tuple[Array, Array]:
        """The share of eigenvalues below ``points``, smoothed by ``width``, and its standard error."""
        z = (jnp.asarray(points)[..., None, None] - self.nodes) / width
        return self._over_probes((1 + erf(z / jnp.sqrt(2.0))) / 2)

    def mean(self, function: jax.typing.ArrayLike) -> tuple[Array, Array]:
        """Of values (probes, steps) of a function at the nodes: tr f(A)/n, and its standard error."""
        return self._over_probes(jnp.asarray(function))

    def _over_probes(self, values: Array) -> tuple[Array, Array]:
        each = jnp.sum(self.weights * values, axis=-1)
        probes = each.shape[-1]
        return each.mean(axis=-1), each.std(axis=-1, ddof=1) / probes**0.5


@dataset.on_automatic_axes
def spectral_density(op: LinearOperator, *, key: Array, num_probes: int = 8, num_steps: int = 64) -> SpectralDensity:
    """Stochastic Lanczos quadrature: the spectrum as a random vector sees it, averaged over vectors.

    For a random unit vector v, vᵀf(A)v has the mean tr f(A)/n, and Gauss quadrature by ``num_steps`` Lanczos steps
    evaluates it exactly for polynomials f of degree up to 2·num_steps − 1.

    Args:
      op: a symmetric operator over n numbers.
      key: a `jax.random.key` for the probes.
      num_probes: how many random vectors, at least 2 for a standard error.
      num_steps: Lanczos steps a probe; at most n are taken. So many vectors like params are held at a time.

    Returns:
      A `SpectralDensity`.

    Raises:
      TypeError, ValueError: an argument is out of range.

    Reference:
      Ghorbani, Krishnan & Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density",
      ICML 2019, algorithm 1.
    """
    check_one_batch("spectral_density", op)
    contract.check_count("num_probes", num_probes, 2)
    contract.check_count("num_steps", num_steps)
    steps = min(num_steps, op.space.size)
    nodes, weights = _quadrature(flattened(op), jax.random.split(key, num_probes), steps)
    return SpectralDensity(nodes, weights, num_probes * steps)


@functools.partial(jax.jit, static_argnames="steps")
def _quadrature(op: LinearOperator, keys: Array, steps: int) -> tuple[Array, Array]:
    def probe(key: Array) -> tuple[Array, Array]:
        state = _lanczos.init(op.space.random(key), steps)
        state = lax.fori_loop(0, steps, lambda _, state: _lanczos.step(op, state), state)
        # After a breakdown T has no entry between its blocks: the later nodes have weight 0 by themselves.
        found = _lanczos.ritz(state)
        return found.values, found.coefficients[0] ** 2

    return lax.map(probe, keys)
