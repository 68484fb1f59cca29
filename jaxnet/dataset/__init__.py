"""Examples, and the means, sums and rows over them: in memory, by chunks, or in a stream of batches.

Everything in this library is a mean, a sum or rows of a function of examples. Who computes one of them says `mean`,
`total` or `rows` of a function of a batch, and does not ask how the examples are held:

- a pytree of arrays that share a leading axis is one batch in memory, worked on whole or, given a ``size``, a chunk of
  that many examples at a time inside one compiled scan;
- a `Stream` is a data set in batches, gone through on the host, once for each result.

`jit`, `while_loop`, `cond` and `map` are JAX's own, and run on the host where the data are there. Arrays on a mesh of
explicit axes, whose shardings JAX would have every operation name, are worked on as on automatic ones.
"""

from jaxnet.dataset._host import cond, jit, map, while_loop
from jaxnet.dataset._streams import Stream, afresh, check_in_memory, first, num_examples, of, on_host, with_rows
from jaxnet.dataset._sums import mean, rows, rows_and_total, total
from jaxnet.mesh import on_automatic_axes, on_explicit_axes

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


def __dir__() -> list[str]:
    return sorted(__all__)
