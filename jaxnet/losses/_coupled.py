"""Is a loss a mean over examples that do not see one another?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.losses._rounded import rounding

# Sets of examples on which a loss is tried, and how many there are in one.
_DRAWS, _ROWS = 4, 32


def check_mean(loss: Loss, params: ArrayTree, batch: ArrayTree, key: Array | None = None) -> None:
    """Raise unless E is, on a few examples, the mean of the examples' own losses, and so is its gradient.

    Several sets of examples are drawn, since those that lie together are often alike: sorted by class, say. By values,
    so that nothing is checked where one of them is a tracer.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point at which it is tried.
      batch: the examples, in memory.
      key: for the draw; by default the same rows at each call.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.
      UserError: the loss is no such mean.
    """
    contract.check_params(params)
    n = contract.num_examples(batch)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, batch))):
        return
    size = min(n, _ROWS)
    rng = np.random.default_rng(0 if key is None else np.asarray(jax.random.key_data(key)))
    rows = [rng.choice(n, size, replace=False) for _ in range(_DRAWS)]
    # A loss of `mixed_precision` rounds by itself, each example and the whole in another way.
    tolerance = max(float(jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps) ** 0.5, rounding(loss))
    remedy = (
        "are its examples coupled, as by batch normalisation in training mode, or is it a sum? Use running statistics, "
        "or a normalisation within each example, and the mean over the batch"
    )
    for draw in rows:
        found = _both_ways(loss, params, batch, draw)
        # The loss may read a tracer that is no argument.
        if any(isinstance(x, jax.core.Tracer) for x in found):
            return
        whole, mean, gradient, apart = map(float, found)
        if abs(whole - mean) > tolerance * max(abs(whole), abs(mean)):
            got = f"on {size} examples it is {whole:.4g}, but the mean of their own losses is {mean:.4g}"
            raise contract.UserError(f"loss: {got}; {remedy}")
        if apart > 10 * tolerance * gradient:
            raise contract.UserError(
                f"loss: its gradient on {size} examples is not the mean of their own losses' gradients; {remedy}"
            )


@functools.partial(dataset.jit, static_argnames="loss")
def _both_ways(loss: Loss, params: ArrayTree, batch: ArrayTree, rows: Array) -> tuple[Array, Array, Array, Array]:
    """E on these rows, the mean of their own losses, the length of E's gradient, and how far that mean's is."""
    contract.check(loss, params, batch)
    few = jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)
    one = lambda p, example: loss(p, jax.tree.map(lambda x: x[None], example))
    mean_of_own = lambda p, b: jax.vmap(one, in_axes=(None, 0))(p, b).mean()
    joined = lambda tree: ravel_pytree(tree)[0].astype(jnp.promote_types(jnp.result_type(float), jnp.float32))
    (whole, gradient), (mean, own) = (jax.value_and_grad(f)(params, few) for f in (loss, mean_of_own))
    gradient, own = joined(gradient), joined(own)
    return whole, mean, jnp.linalg.norm(gradient), jnp.linalg.norm(gradient - own)
