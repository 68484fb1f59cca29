"""Trace and diagonal of an operator from its products with random vectors, by matfree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxnet import contract, dataset
from jaxnet.contract import Array
from jaxnet.curvature._lanczos import norm
from jaxnet.curvature._operators import LinearOperator, check_one_batch, materialize

# Products a probe.
METHODS = {"hutchinson": 1, "hutch++": 3, "xtrace": 2}


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Estimate:
    """A random estimate.

    Attributes:
      value: a number, or a pytree.
      standard_error: like it; estimated from how the samples differ.
      num_matvecs: products spent.
    """

    value: Any
    standard_error: Any
    num_matvecs: int = dataclasses.field(metadata={"static": True})


def _matfree() -> Any:
    try:
        from matfree import stochtrace
    except ImportError as error:
        raise ImportError('trace and diagonal need matfree: pip install "jaxnet[stochastic]"') from error
    return stochtrace


@dataset.on_automatic_axes
def trace(op: LinearOperator, *, key: Array, num_matvecs: int = 60, method: str = "xtrace") -> Estimate:
    """tr A without forming A.

    "hutchinson" is the mean of vᵀAv over random signs, whose error falls as 1/√m in m products. "hutch++" and "xtrace"
    first take what the range of A on some probes captures exactly, and estimate the rest: where the eigenvalues decay,
    as those of a network's Hessian do, their error falls as 1/m and faster.

    Args:
      op: a symmetric operator over n numbers.
      key: a `jax.random.key` for the probes.
      num_matvecs: products to spend; n of them give the trace itself. "hutch++" holds two thirds as many vectors like
        params at a time, the others as many.
      method: "hutchinson", "hutch++" or "xtrace".

    Raises:
      ImportError: matfree is not installed (extra ``stochastic``).
      TypeError, ValueError: an argument is out of range.

    Reference:
      Hutchinson 1990; Meyer, Musco, Musco & Woodruff, "Hutch++", SOSA 2021, algorithm 1; Epperly, Tropp & Webber,
      "XTrace", SIMAX 2024, section 2.1.
    """
    n = _check("trace", op)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    # One product tells the matrix's size, by which matfree's XTrace, which knows a rank by absolute sizes, wants it.
    passes, first = METHODS[method], int(method == "xtrace")
    if num_matvecs < 2 * passes + first:
        raise ValueError(f"num_matvecs: expected {2 * passes + first} or more for {method}, got {num_matvecs}")
    if num_matvecs >= n:
        exact = jnp.trace(materialize(op))
        return Estimate(exact, jnp.zeros_like(exact), n)
    probes = (num_matvecs - first) // passes
    value, error = _estimate(op, key, method, probes)
    return Estimate(value, error, passes * probes + first)


@dataset.on_automatic_axes
def diagonal(op: LinearOperator, *, key: Array, num_matvecs: int = 60) -> Estimate:
    """diag A, a pytree like params, as the mean of v∘Av over random signs v.

    The error of an entry is that of the rest of its row, √(Σ_{j≠i} a_ij²/m).

    Args:
      op: a symmetric operator.
      key: a `jax.random.key` for the probes.
      num_matvecs: m, products to spend.

    Raises:
      ImportError: matfree is not installed (extra ``stochastic``).
      TypeError, ValueError: an argument is out of range.

    Reference:
      Bekas, Kokiopoulou & Saad, "An Estimator for the Diagonal of a Matrix", Applied Numerical Mathematics 2007, eq. 2.
    """
    _check("diagonal", op)
    if num_matvecs < 2:
        raise ValueError(f"num_matvecs: expected 2 or more, got {num_matvecs}")
    value, error = _estimate(op, key, "diagonal", num_matvecs)
    return Estimate(value, error, num_matvecs)


def _check(name: str, op: LinearOperator) -> int:
    check_one_batch(name, op)
    return op.space.size


@functools.partial(jax.jit, static_argnames=("method", "probes"))
def _estimate(op: LinearOperator, key: Array, method: str, probes: int) -> tuple[Any, Any]:
    """An estimate and its standard error."""
    stochtrace = _matfree()
    # matfree maps a product over all probes at once; one at a time, only the probes take memory, no activations.
    matvec = jax.custom_batching.sequential_vmap(lambda v, op: op(v))
    if method == "hutch++":
        return _hutch_plus_plus(op, key, probes)
    if method == "xtrace":
        size = norm(op @ op.space.random(jax.random.fold_in(key, 0)))
        size = jnp.where(size > 0, size, 1)
        sampler = stochtrace.sampler_normal(op.space.zeros(), num=probes)
        estimator = stochtrace.estimator_leave_one_out_mean_and_sem(stochtrace.leave_one_out_xtrace(), sampler)
        return optax.tree.scale(size, estimator(matvec, key, (1 / size) * op))
    integrand = stochtrace.monte_carlo_trace() if method == "hutchinson" else stochtrace.monte_carlo_diagonal()
    sampler = stochtrace.sampler_signs(op.space.zeros(), num=probes)
    return stochtrace.estimator_monte_carlo_mean_and_sem(integrand, sampler)(matvec, key, op)


def _hutch_plus_plus(op: LinearOperator, key: Array, probes: int) -> tuple[Array, Array]:
    """tr QᵀAQ of a basis Q of A's range on some probes, and Hutchinson's estimate of the rest."""
    flat, unravel = ravel_pytree(op.space.zeros())
    times = lambda columns: lax.map(lambda v: ravel_pytree(op(unravel(v)))[0], columns.T).T
    sketch, signs = jax.random.rademacher(key, (2, flat.size, probes), flat.dtype)
    basis = jnp.linalg.qr(times(sketch))[0]
    # Twice, so that what is left of the probes is orthogonal to Q to rounding.
    for _ in range(2):
        signs = signs - basis @ (basis.T @ signs)
    rest = jnp.sum(signs * times(signs), axis=0)
    return jnp.vdot(basis, times(basis)) + rest.mean(), rest.std(ddof=1) / probes**0.5
