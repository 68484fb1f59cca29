"""A data set in batches, told from one batch in memory; and rows of numbers beside its examples."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jaxnet import contract
from jaxnet.contract import ArrayTree
from jaxnet.dataset._content import Content
from jaxnet.mesh import automatic


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A data set in batches of any lengths, each weighted by its number of examples.

    To JAX it is a leaf that no program can take: what works on it runs on the host.

    Attributes:
      batches: each a pytree of arrays with a leading axis of examples; iterated anew for each pass.
      passes: what the first pass held that a result was summed over; another one must hold the same.
    """

    batches: Iterable[Any]
    passes: list[Content] = dataclasses.field(default_factory=list, repr=False)

    def __iter__(self) -> Iterator[Any]:
        """The batches of one pass.

        Raises:
          ValueError: there is none.
        """
        empty = True
        for batch in self.batches:
            empty = False
            yield automatic(batch)
        if empty:
            raise ValueError("batch: expected at least one batch, got none")


def afresh(data: Any) -> Any:
    """The same data; of a stream, one whose next pass may hold other examples than those before."""
    return Stream(data.batches) if isinstance(data, Stream) else data


def of(batch: Any) -> Any:
    """What a person passes as ``batch``, as this module takes it: itself, or a `Stream`.

    A list is a stream unless all of its entries are arrays; then it is one batch, and so are a tuple, a dict and any
    other pytree. Anything else that can be iterated over, such as a data loader, is a stream.

    Raises:
      TypeError: an iterator, which can be gone through only once.
    """
    if isinstance(batch, list):
        one_batch = bool(batch) and all(hasattr(entry, "shape") for entry in batch)
        return batch if one_batch else Stream(batch)
    if isinstance(batch, Stream) or hasattr(batch, "shape") or not isinstance(batch, Iterable):
        return batch
    if not jax.tree_util.all_leaves([batch]):
        return batch
    if isinstance(batch, Iterator):
        raise TypeError("batch: got an iterator, which ends after one pass; pass a list, or an object to iterate anew")
    return Stream(batch)


def on_host(*trees: Any) -> bool:
    """Whether there is a `Stream` among the leaves."""
    return any(isinstance(leaf, Stream) for leaf in jax.tree.leaves(trees))


def check_in_memory(name: str, data: Any, instead: str) -> None:
    """Raise where a data set in batches cannot serve, with words for what can.

    Raises:
      TypeError: the data are, or hold, a stream.
    """
    if on_host(of(data)):
        raise TypeError(f"{name}: needs one batch in memory, got a data set in batches; {instead}")


def num_examples(data: Any) -> int:
    """N; of a stream, by a pass over its batches."""
    return (
        sum(contract.num_examples(batch) for batch in data) if isinstance(data, Stream) else contract.num_examples(data)
    )


def first(data: Any) -> Any:
    """A batch in memory itself; of a stream, its first batch."""
    return next(iter(data)) if isinstance(data, Stream) else data


def with_rows(data: Any, values: ArrayTree) -> Any:
    """``(batch, part)`` in place of each batch, with the part of ``values`` (N, ...) that belongs to its examples."""
    return Stream(_WithRows(data, values)) if isinstance(data, Stream) else (data, values)


@dataclasses.dataclass(frozen=True, eq=False)
class _WithRows:
    batches: Stream
    values: ArrayTree

    def __iter__(self) -> Iterator[Any]:
        start, n, content = 0, contract.num_examples(self.values), Content()
        for batch in self.batches:
            content.add(batch)
            stop = start + contract.num_examples(batch)
            if stop <= n:
                yield batch, jax.tree.map(lambda x, start=start, stop=stop: x[start:stop], self.values)
            start = stop
        if start != n:
            raise ValueError(f"batch: this pass over the batches had {start} examples, and there are {n} rows for them")
        if any(seen.in_this_order != content.in_this_order for seen in self.batches.passes):
            raise contract.UserError(
                "batch: this pass over the batches held their examples in another order, and each has a row of its "
                "own; let the order stay, or pass a list of the batches of one pass"
            )
