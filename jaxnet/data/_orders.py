"""Which examples each step of an epoch sees, as functions of a key."""

import numbers
from collections.abc import Callable, Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxnet import dataset
from jaxnet.contract import Array, ArrayTree, UserError, check_batch_size, num_examples

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


def check_num_shards(num_shards: int, num_examples: int, batch_size: int | None) -> int:
    """S, if the examples and, where there is one, the batch size are multiples of it.

    Raises:
      UserError: they are not.
    """
    whole = not isinstance(num_shards, bool) and isinstance(num_shards, numbers.Integral) and num_shards >= 1
    if not whole:
        raise UserError(f"num_shards: expected a whole number from 1 on, got {num_shards}")
    for name, number in (("the number of examples", num_examples), ("batch_size", batch_size)):
        if number is not None and number % num_shards:
            raise UserError(
                f"num_shards: expected a divisor of {name}, {number}, got {num_shards}; take another, or leave out "
                f"{number % num_shards} examples"
            )
    return int(num_shards)


def in_shards(order: Order, key: Array, epoch: Array | int, num_examples: int, num_shards: int) -> Array:
    """(S, N/S) rows of each of S shards, of N/S examples that lie together, in the order in which an epoch sees them.

    Each shard has an order of its own, by its own key, so that a step, which takes as many from each, moves no example
    from one shard to another, wherever they lie. One shard has the order itself.
    """
    if num_shards == 1:
        return order(key, epoch, num_examples)[None]
    keys = jax.vmap(lambda shard: jax.random.fold_in(key, shard))(jnp.arange(num_shards))
    return jax.vmap(lambda key: order(key, epoch, num_examples // num_shards))(keys)


def rows_in_shards(batch: ArrayTree, rows: Array) -> ArrayTree:
    """The examples at ``rows`` (S, b) of each of S shards, one shard after the other: leaves (S·b, ...)."""
    num_shards, size = rows.shape

    def leaf(x: Array) -> Array:
        x = jnp.asarray(x)
        if num_shards == 1:
            return x[rows[0]]
        apart = x.reshape(num_shards, -1, *x.shape[1:])
        return jax.vmap(lambda part, at: part[at])(apart, rows).reshape(num_shards * size, *x.shape[1:])

    return jax.tree.map(leaf, batch)


def batches(
    batch: ArrayTree,
    batch_size: int,
    *,
    key: Array,
    drop_last: bool = False,
    order: Order = reshuffled,
    epoch: int = 0,
    num_shards: int = 1,
) -> Iterator[ArrayTree]:
    """One epoch's mini-batches for a loop of one's own, those that `jaxnet.training.fit` takes with this key.

    Args:
      batch: the data, leaves (N, ...).
      batch_size: B, from 1 to N.
      key: a `jax.random.key` for the order.
      drop_last: leave out a last batch that is smaller than B.
      order: `reshuffled`, `independent`, `cyclic` or one's own.
      epoch: which epoch, counted from 0.
      num_shards: S, as for `jaxnet.training.fit`.

    Raises:
      ValueError: B is not in 1…N, the leaves' lengths differ, or S does not divide N and B.
    """
    dataset.check_in_memory("batches", batch, "it has batches already: pass it to fit as it is")
    n = num_examples(batch)
    check_batch_size(batch_size, n)
    check_num_shards(num_shards, n, batch_size)
    indices, own = in_shards(order, key, epoch, n, num_shards), batch_size // num_shards

    def iterate() -> Iterator[ArrayTree]:
        length = n // num_shards
        for start in range(0, length - own + 1 if drop_last else length, own):
            yield rows_in_shards(batch, indices[:, start : start + own])

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
