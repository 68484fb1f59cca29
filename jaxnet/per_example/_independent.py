"""Is a loss what everything here takes it for: the mean over examples that do not see one another?"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss

# Examples that are compared; two that see one another are enough.
_SAMPLE = 4


def check_independent(loss: Loss, params: ArrayTree, batch: Any) -> None:
    """Raise unless E is, on the first few examples, the mean of the examples' own losses, and so is its gradient.

    A sum instead of a mean, and a loss whose examples are coupled, as by batch normalisation in training mode, have
    no per-example gradients that add up to the batch's. Compared up to the square root of the params' precision.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point at which it is tried; values, not tracers.
      batch: examples; of a data set in batches the first is looked at.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract, or the loss is no such mean.
    """
    batch = dataset.first(dataset.of(batch))
    contract.check_params(params)
    size = min(contract.num_examples(batch), _SAMPLE)
    whole, mean, size_of_gradient, apart = _both_ways(loss, params, batch)
    tolerance = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps) ** 0.5
    remedy = (
        "are its examples coupled, as by batch normalisation in training mode, or is it a sum? Use running statistics, "
        "or a normalisation within each example, and the mean over the batch"
    )
    if abs(whole - mean) > tolerance * max(abs(whole), abs(mean)):
        got = f"on {size} examples it is {float(whole):.4g}, but the mean of their own losses is {float(mean):.4g}"
        raise ValueError(f"loss: {got}; {remedy}")
    if apart > 10 * tolerance * size_of_gradient:
        raise ValueError(
            f"loss: its gradient on {size} examples is not the mean of their own losses' gradients; {remedy}"
        )


@functools.partial(dataset.jit, static_argnames="loss")
def _both_ways(loss: Loss, params: ArrayTree, batch: ArrayTree) -> tuple[Array, Array, Array, Array]:
    """E, the mean of the examples' own losses, the length of E's gradient, and how far that mean's lies from it."""
    contract.check(loss, params, batch)
    batch = jax.tree.map(lambda x: x[:_SAMPLE], batch)
    one = lambda p, example: loss(p, jax.tree.map(lambda x: x[None], example))
    apart = lambda p, b: jax.vmap(one, in_axes=(None, 0))(p, b).mean()
    whole, gradient = jax.value_and_grad(loss)(params, batch)
    mean, mean_gradient = jax.value_and_grad(apart)(params, batch)
    return whole, mean, optax.tree.norm(gradient), optax.tree.norm(optax.tree.sub(gradient, mean_gradient))
