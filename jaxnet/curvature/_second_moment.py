"""Second moments of the examples' gradients, as operators whose products replay the gradients' factors."""

import dataclasses
from typing import Any

from jaxnet import contract, dataset
from jaxnet.contract import ArrayTree, Loss
from jaxnet.curvature._operators import LinearOperator, mean_operator
from jaxnet.per_example._gradients import PerExampleGradients, gradients


@dataclasses.dataclass(frozen=True)
class _SecondMoment:
    centred: bool

    def __call__(self, params: ArrayTree, grads: PerExampleGradients, v: ArrayTree) -> ArrayTree:
        n, along = grads.num_examples, grads.vdot(v)
        if not self.centred:
            return grads.weighted_sum(along / n)
        # Σ (g_n − ḡ)(g_n − ḡ)·v: the deviations of g_n·v sum to 0, so that ḡ drops out of the other factor.
        return grads.weighted_sum((along - along.mean()) / (n - 1))


@dataclasses.dataclass(frozen=True)
class _OfBatch:
    """The product that finds the gradients anew, for data that come in batches."""

    loss: Loss

    def __call__(self, params: ArrayTree, batch: ArrayTree, v: ArrayTree) -> ArrayTree:
        return _SecondMoment(centred=False)(params, gradients(self.loss, params, batch), v)


def empirical_fisher(loss: Loss, params: ArrayTree, batch: Any) -> LinearOperator:
    """(1/N) Σ g_n g_nᵀ, with the gradients g_n of the examples' own losses at their own targets.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the point.
      batch: N examples, or a data set in batches, as for `hessian`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.

    Reference:
      Kunstner, Balles & Hennig, "Limitations of the Empirical Fisher Approximation", NeurIPS 2019, eq. 3 (over N).
    """
    if dataset.on_host(dataset.of(batch)):
        return mean_operator(_OfBatch(loss), params, batch)
    grads = gradients(loss, params, batch)
    return LinearOperator(_SecondMoment(centred=False), grads.params, grads)


def gradient_covariance(loss: Loss, params: ArrayTree, batch: ArrayTree) -> LinearOperator:
    """Σ = Σ_n (g_n − ḡ)(g_n − ḡ)ᵀ/(N − 1), the unbiased covariance of the examples' gradients.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the point.
      batch: N >= 2 examples.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract, or N is 1.
    """
    contract.check_params(params)
    if contract.num_examples(batch) < 2:
        raise ValueError("batch: a covariance needs 2 examples or more, got 1")
    grads = gradients(loss, params, batch)
    return LinearOperator(_SecondMoment(centred=True), grads.params, grads)
