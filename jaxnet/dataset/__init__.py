"""Examples, and the means, sums and rows over them: in memory, by chunks, or in a stream of batches.

Everything in this library is a mean, a sum or rows of a function of examples. Who computes one of them says `mean`,
`total` or `rows` of a function of a batch, and does not ask how the examples are held:

- a pytree of arrays that share a leading axis is one batch in memory, worked on whole or, given a ``size``, a chunk of
  that many examples at a time inside one compiled scan;
- a `Stream` is a data set in batches, gone through on the host, once for each result.

`jit`, `while_loop`, `cond` and `map` are JAX's own, and run on the host where the data are there. Arrays on a mesh of
explicit axes, whose shardings JAX would have every operation name, are worked on as on automatic ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree
from jaxnet.dataset._content import Content
from jaxnet.mesh import automatic, keep_pace, on_automatic_axes, on_explicit_axes

__all__ = [
    "Stream",
    "afresh",
    "check_in_memory",
    "cond",
    "first",
    "jit",
    "map",
    "mean",
    "num_examples",
    "of",
    "on_automatic_axes",
    "on_explicit_axes",
    "on_host",
    "rows",
    "rows_and_total",
    "total",
    "while_loop",
    "with_rows",
]

State = TypeVar("State")


def __dir__() -> list[str]:
    return sorted(__all__)


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


def _check_pass(data: Stream, content: Content) -> None:
    """Raise unless a pass held what the first one did, in whatever order."""
    if not data.passes:
        data.passes.append(content)
    seen = data.passes[0]
    if (seen.num, seen.in_any_order) != (content.num, content.in_any_order):
        raise contract.UserError(
            f"batch: a pass over the batches held other examples than the first ({content.num} and {seen.num} of "
            "them), and this result needs the same ones at each pass; fix what draws, augments or drops them, or pass "
            "a list of the batches of one pass"
        )


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


def mean(function: Callable[..., Any], data: Any, *given: Any, size: int | None = None) -> Any:
    """Σ_c (N_c/N) function(batch c, *given), for any mean over a batch's examples, a pytree of arrays.

    Args:
      function: ``function(batch, *given)``; over a stream it is compiled, once for each shape of a batch, so it has to
        be hashable and the same object (or an equal one) at each call.
      data: as `of` returns it.
      *given: what else the function reads, and what may change from call to call.
      size: examples a chunk, in memory; by default all of them at once.

    Returns:
      The mean over all examples, in the function's dtypes; summed in float32 or better.
    """
    if _whole(data, size):
        return function(data, *given)
    return _accumulate(_Sums(function), data, given, size, weighted=True)[1]


def total(function: Callable[..., Any], data: Any, *given: Any, size: int | None = None) -> Any:
    """Σ_c function(batch c, *given), for any sum over a batch's examples; arguments and precision as for `mean`."""
    return rows_and_total(_Sums(function), data, *given, size=size)[1]


def rows(function: Callable[..., Any], data: Any, *given: Any, size: int | None = None) -> Any:
    """function(batch, *given) (N_c, ...) of all batches, joined along that axis; arguments as for `mean`."""
    return rows_and_total(_Rows(function), data, *given, size=size)[0]


def rows_and_total(function: Callable[..., Any], data: Any, *given: Any, size: int | None = None) -> tuple[Any, Any]:
    """Both at once, of ``function(batch, *given) -> (rows, sums)``."""
    if _whole(data, size):
        return function(data, *given)
    return _accumulate(function, data, given, size, weighted=False)


@dataclasses.dataclass(frozen=True)
class _Sums:
    function: Callable[..., Any]

    def __call__(self, batch: Any, *given: Any) -> Any:
        return (), self.function(batch, *given)


@dataclasses.dataclass(frozen=True)
class _Rows:
    function: Callable[..., Any]

    def __call__(self, batch: Any, *given: Any) -> Any:
        return self.function(batch, *given), ()


def _whole(data: Any, size: int | None) -> bool:
    return not isinstance(data, Stream) and (size is None or contract.num_examples(data) <= size)


def _accumulate(
    function: Callable[..., Any], data: Any, given: Any, size: int | None, *, weighted: bool
) -> tuple[Any, Any]:
    """The library's one loop over examples: all rows, and the sum of the sums or their mean by numbers of examples."""
    if isinstance(data, Stream):
        entries, summed, like, n = _over_stream(function, data, given, weighted=weighted)
    else:
        size = contract.num_examples(data) if size is None else size
        entries, summed, like, n = _over_chunks(function, data, given, weighted=weighted, size=size)
    return entries, jax.tree.map(lambda x, d: (x / n if weighted else x).astype(d.dtype), summed, like)


def _over_stream(function: Callable[..., Any], data: Stream, given: Any, *, weighted: bool) -> Any:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given)):
        raise TypeError(
            "batch: a data set in batches is gone through on the host, where nothing can be traced: call this outside "
            "of jit, grad and vmap, or pass one batch in memory"
        )
    entries, summed, sums, n, content = [], None, None, 0, Content()
    for batch in data:
        num = contract.num_examples(batch)
        part, sums = _compiled(function, batch, given)
        weight = num if weighted else 1
        summed = keep_pace(_scaled(sums, weight) if summed is None else _added(summed, sums, weight))
        entries.append(part)
        n += num
        content.add(batch)  # while the device works
    _check_pass(data, content)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *entries), summed, sums, n


def _over_chunks(function: Callable[..., Any], batch: Any, given: Any, *, weighted: bool, size: int) -> Any:
    n = contract.num_examples(batch)
    size = _even(size, n)
    whole = n // size * size
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), batch)
    like = jax.eval_shape(lambda chunks: function(jax.tree.map(lambda x: x[0], chunks), *given)[1], chunks)

    def step(summed: Any, chunk: Any) -> tuple[Any, Any]:
        part, sums = function(chunk, *given)
        return _add(summed, sums, size if weighted else 1), part

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, _wide(s.dtype)), like)
    summed, entries = lax.scan(step, zeros, chunks)
    entries = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), entries)
    if whole < n:
        more, rest = function(jax.tree.map(lambda x: x[whole:], batch), *given)
        entries = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), entries, more)
        summed = _add(summed, rest, n - whole if weighted else 1)
    return entries, summed, like, n


def _even(size: int, n: int) -> int:
    """The largest chunk, up to this size, that parts on several devices are cut into without remainders.

    Where a chunk, or what is left of the last, is padded to lie on all devices, XLA reads the rows of a lookup wrongly
    (jaxlib 0.10 on CPUs). How the examples lie is not known inside a `jit`: on any number of parts that divides both.
    """
    parts = [d for d in range(2, jax.device_count() + 1) if jax.device_count() % d == 0 and n % d == 0]
    fits = lambda size: all(size % d == 0 or (n // d) % size == 0 for d in parts)
    return next(s for s in range(size, 0, -1) if fits(s))


@functools.partial(jax.jit, static_argnums=0)
def _compiled(function: Callable[..., Any], batch: Any, given: Any) -> Any:
    return function(batch, *given)


def _wide(dtype: Any) -> Any:
    """A running sum of many small terms stands still in half precision."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _scale(sums: Any, weight: Array | int) -> Any:
    sums = jax.tree.map(jnp.asarray, sums)
    return jax.tree.map(lambda x: jnp.asarray(weight, _wide(x.dtype)) * x.astype(_wide(x.dtype)), sums)


def _add(summed: Any, sums: Any, weight: Array | int) -> Any:
    return jax.tree.map(jnp.add, summed, _scale(sums, weight))


# For a stream's batches, one after the other; inside a scan they are a part of its program.
_scaled, _added = jax.jit(_scale), jax.jit(_add)


def jit(function: Callable[..., Any], *, static_argnames: str | tuple[str, ...] = ()) -> Callable[..., Any]:
    """`jax.jit`, `on_automatic_axes`; a call with a stream among its arguments runs as it stands, on the host."""
    compiled = jax.jit(on_automatic_axes(function), static_argnames=static_argnames)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if on_host(args, kwargs) else compiled)(*args, **kwargs)

    return on_automatic_axes(call)


def while_loop(going_on: Callable[[State], Any], step: Callable[[State], State], state: State, *, data: Any) -> State:
    """`lax.while_loop`, or the same on the host where ``data`` holds a stream."""
    if not on_host(data):
        return lax.while_loop(going_on, step, state)
    while going_on(state):
        state = step(state)
    return state


def cond(which: Any, yes: Callable[..., State], no: Callable[..., State], *operands: Any, data: Any) -> State:
    """`lax.cond`, or the same on the host where ``data`` holds a stream."""
    if not on_host(data):
        return lax.cond(which, yes, no, *operands)
    return (yes if which else no)(*operands)


def map(function: Callable[[Any], Any], xs: Any, *, data: Any) -> Any:
    """`lax.map`, or the same on the host where ``data`` holds a stream."""
    if not on_host(data):
        return lax.map(function, xs)
    results = [function(jax.tree.map(lambda x, i=i: x[i], xs)) for i in range(contract.num_examples(xs))]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *results)
