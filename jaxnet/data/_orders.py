"""Which examples each step of an epoch sees, as functions of a key."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxnet import dataset
from jaxnet.contract import Array, ArrayTree, check_batch_size, num_examples

Order: TypeAlias = Callable[[Array, Array | int, int], Array]
"""``order(key, epoch, N) -> (N,) indices``: the examples of that epoch in their order, step after step."""


def reshuffled(key: Array, epoch: Array | int, num_examples: int) -> Array:
    """Every example once an epoch, in a new random order each epoch."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)


def independent(key: Array, epoch: Array | int, num_examples: int) -> Array:
    """Examples drawn with replacement: what the theory of stochastic gradients assumes."""
    return jax.random.randint(jax.random.fold_in(key, epoch), (num_examples,), 0, num_examples)


def cyclic(key: Array, epoch: Array | int, num_examples: int) -> Array:
    """The data's own order, the same each epoch; the key is not used."""
    return jnp.arange(num_examples)


def batches(
    batch: ArrayTree,
    batch_size: int,
    *,
    key: Array,
    drop_last: bool = False,
    order: Order = reshuffled,
    epoch: int = 0,
) -> Iterator[ArrayTree]:
    """One epoch's mini-batches for a loop of one's own, those that `jaxnet.training.fit` takes with this key.

    Args:
      batch: the data, leaves (N, ...).
      batch_size: B, from 1 to N.
      key: a `jax.random.key` for the order.
      drop_last: leave out a last batch that is smaller than B.
      order: `reshuffled`, `independent`, `cyclic` or one's own.
      epoch: which epoch, counted from 0.

    Raises:
      ValueError: B is not in 1…N, or the leaves' lengths differ.
    """
    dataset.check_in_memory("batches", batch, "it has batches already: pass it to fit as it is")
    n = num_examples(batch)
    check_batch_size(batch_size, n)
    indices = order(key, epoch, n)

    def iterate() -> Iterator[ArrayTree]:
        for start in range(0, n - batch_size + 1 if drop_last else n, batch_size):
            rows = indices[start : start + batch_size]
            yield jax.tree.map(lambda x: x[rows], batch)

    return iterate()


def repeated(batch: ArrayTree, times: int) -> ArrayTree:
    """The data ``times`` over, one copy after the other: leaves (times·N, ...).

    Raises:
      ValueError: ``times`` is below 1, or the leaves' lengths differ.
    """
    if times < 1:
        raise ValueError(f"times: expected 1 or more, got {times}")
    dataset.check_in_memory("repeated", batch, "go through it several times")
    num_examples(batch)
    return jax.tree.map(lambda x: jnp.concatenate([x] * times), batch)


def with_keys(key: Array, batch: ArrayTree) -> ArrayTree:
    """``(inputs, targets)`` with a key an example as a third part: ``augment=with_keys`` in `fit` turns dropout on."""
    inputs, targets = batch
    return inputs, targets, jax.random.split(key, num_examples(batch))
