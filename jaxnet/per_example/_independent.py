"""Is a loss what everything here takes it for: the mean over examples that do not see one another?"""

from typing import Any

from jaxnet import contract, dataset, losses
from jaxnet.contract import Array, ArrayTree, Loss


@contract.takes_loss
def check_independent(loss: Loss, params: ArrayTree, batch: Any, *, key: Array | None = None) -> None:
    """Raise unless E is, on a few examples, the mean of the examples' own losses, and so is its gradient.

    A sum instead of a mean, a loss whose examples are coupled, as by batch normalisation in training mode, and one that
    weighs them by what else is in the batch have no per-example gradients that add up to the batch's. Tried on four
    draws of 32 examples; compared up to the square root of the params' precision. A coupling that shows on rare
    examples only can be missed.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point at which it is tried; values, not tracers, of which nothing can be said.
      batch: examples; of a data set in batches the first is looked at.
      key: a `jax.random.key` for the draws; by default the same rows at each call.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.
      UserError: the loss is no such mean.
    """
    losses.check_mean(loss, params, dataset.first(dataset.of(batch)), key)
