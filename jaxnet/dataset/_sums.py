"""Means, sums and rows over examples, and the library's one loop over them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array
from jaxnet.dataset._content import Content
from jaxnet.dataset._streams import Stream
from jaxnet.mesh import keep_pace


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
