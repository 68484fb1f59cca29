"""Labels that a criterion cannot take, told by name and place."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.losses._criteria import sigmoid_cross_entropy, softmax_cross_entropy, squared_error
from jaxnet.losses._means import parts_of

_CRITERIA = (squared_error, softmax_cross_entropy, sigmoid_cross_entropy)


@dataset.on_automatic_axes
def check_labels(loss: Loss, params: ArrayTree, batch: Any, name: str) -> None:
    """Raise where a criterion of this room is NaN by a label, whatever the network says.

    Of values at hand; of another loss nothing is asked.

    Raises:
      UserError: a target is not finite, or a label is out of its range; ``name`` is what the message calls the batch.
    """
    try:
        parts = parts_of(loss)[0]
    except TypeError:
        return
    targets = jnp.asarray(batch[1])
    if parts.criterion not in _CRITERIA or isinstance(targets, jax.core.Tracer):
        return
    highest: float = math.inf
    lowest = -highest
    if parts.criterion is softmax_cross_entropy and not jnp.issubdtype(targets.dtype, jnp.floating):
        lowest, highest = 0, jax.eval_shape(parts.outputs, params, batch).shape[-1] - 1
    if parts.criterion is sigmoid_cross_entropy:
        lowest, highest = 0, 1
    bad, first = jax.device_get(_outside(targets, lowest, highest))
    if bad:
        what = "finite numbers" if math.isinf(highest) else f"labels from {lowest} to {highest}"
        raise contract.UserError(
            f"{name}: expected {what} as targets of {parts.criterion.__name__}, got {bad} of {len(targets)} examples "
            f"with others, the first at index {first}; mend these labels, or leave them out"
        )


@dataset.jit
def _outside(targets: Array, lowest: Array | float, highest: Array | float) -> tuple[Array, Array]:
    """How many examples have an entry that is not finite or outside of a range, and the first of them."""
    fine = jnp.isfinite(targets) & (targets >= lowest) & (targets <= highest)
    bad = ~fine.reshape(targets.shape[0], -1).all(axis=1)
    return bad.sum(), bad.argmax()
