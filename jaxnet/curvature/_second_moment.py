"""Second moments of the examples' gradients, as operators whose products replay the gradients' factors."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature._operators import LinearOperator
from jaxnet.curvature._space import Space
from jaxnet.per_example import PerExampleGradients, check_independent, gradients


@contract.takes_loss
def empirical_fisher(loss: Loss, params: ArrayTree, batch: Any) -> LinearOperator:
    """(1/N) Σ g_n g_nᵀ, with the gradients g_n of the examples' own losses at their own targets.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the point.
      batch: N examples, or a data set in batches, as for `hessian`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract, or the loss couples its examples.

    Reference:
      Kunstner, Balles & Hennig, "Limitations of the Empirical Fisher Approximation", NeurIPS 2019, eq. 3 (over N).
    """
    check_independent(loss, params, batch)
    grads = gradients(loss, params, batch)
    return LinearOperator(_second_moment, Space.of(grads.params), (grads, grads.num_examples))


@contract.takes_loss
def gradient_covariance(loss: Loss, params: ArrayTree, batch: Any) -> LinearOperator:
    """Σ = Σ_n (g_n − ḡ)(g_n − ḡ)ᵀ/(N − 1), the unbiased covariance of the examples' gradients.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the point.
      batch: N >= 2 examples, or a data set in batches, as for `hessian`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract, N is 1, or the loss couples its examples.
    """
    check_independent(loss, params, batch)
    grads = gradients(loss, params, batch)
    n = grads.num_examples
    if n < 2:
        raise ValueError("batch: a covariance needs 2 examples or more, got 1")
    return LinearOperator(_covariance, Space.of(grads.params), (grads, n, grads.wide_mean()))


def _second_moment(operands: tuple[PerExampleGradients, int], v: ArrayTree) -> ArrayTree:
    grads, n = operands
    summed, _ = grads.total(_along, v, jnp.zeros(()))
    return jax.tree.map(lambda s, x: (s / n).astype(x.dtype), summed, v)


def _covariance(operands: tuple[PerExampleGradients, int, ArrayTree], v: ArrayTree) -> ArrayTree:
    grads, n, mean = operands
    # Σ (g_n − ḡ)(g_n − ḡ)·v, in one pass. The weights (g_n − ḡ)·v sum to 0, but for rounding, which the last term
    # takes out of a product that is small where the gradients are alike.
    summed, weight = grads.total(_along, v, optax.tree.vdot(mean, v))
    return jax.tree.map(lambda s, m, x: ((s - weight.astype(m.dtype) * m) / (n - 1)).astype(x.dtype), summed, mean, v)


def _along(held: Any, v: ArrayTree, centre: Array) -> tuple[ArrayTree, Array]:
    """Σ w_n g_n and Σ w_n with the weights w_n = g_n·v − c, of the gradients that per_example holds."""
    weights = held.vdot(v) - centre
    return held.weighted_sum(weights), weights.sum()
