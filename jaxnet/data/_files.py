"""A user's own file to ``(inputs, targets)``."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from jaxnet.contract import Array, UserError
from jaxnet.data._archives import read_archive
from jaxnet.data._tables import read_table


def load(
    path: str | pathlib.Path,
    *,
    inputs: str = "x",
    targets: str = "y",
    target: str | None = None,
    drop: str | None = None,
) -> tuple[Array, Array]:
    """Read a data set from an .npz archive (without pickle), or a .csv or .tsv table with a header line.

    A table (extra ``table``: pandas) has columns between commas, semicolons (then numbers may have decimal commas),
    tabs or bars. Of a column of words each word becomes an input, 0 or 1. Left out are an index (columns in front
    without a name), empty columns, dates, words that are the same in each row or in no two, and rows with an empty or
    NA cell, as long as they are fewer than half. `read` tells what was left out and encoded.

    Args:
      path: the file.
      inputs: .npz: the name of the array of inputs, (N, ...).
      targets: .npz: the name of the array of targets, (N, ...).
      target: a table: the column of targets; by default the last. Several, with commas between their names, give
        targets (N, M). All other columns are inputs.
      drop: a table: a column, or several with commas between, to leave out.

    Returns:
      Inputs as floats. Targets: integers if the file has them as integers (or truth values) that int32 holds, else
      floats; of words, their places in the sorted list of them, from 0 on.

    Raises:
      ImportError: pandas is not installed, and the file is a table.
      OSError: the file is not there (FileNotFoundError), is a folder, or may not be opened.
      ValueError: its content cannot be read, an array or column is missing, ambiguous or not numeric, a value is
        infinite, an array's NaN, or the lengths differ. The message names the problem and the mend.
    """
    found = read(path, inputs=inputs, targets=targets, target=target, drop=drop)
    floating = jnp.result_type(float)
    for name, values in (("inputs", found.inputs), ("targets", found.targets)):
        if np.abs(values).max() > jnp.finfo(floating).max:
            raise UserError(f"{path}: {name} hold numbers too large for {floating}; rescale them")
    y = found.targets
    small = np.issubdtype(y.dtype, np.integer) and np.abs(y).max() < 2**31
    return jnp.asarray(found.inputs, floating), jnp.asarray(y, jnp.int32 if small else floating)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What `read` found in a file.

    Attributes:
      inputs: (N, ...), float64.
      targets: (N, ...), int64 where the file has integers, else float64.
      words: what the targets 0, 1, … stand for, if the file has words; None if it has numbers.
      notes: a sentence for each thing that was left out or encoded.
    """

    inputs: np.ndarray
    targets: np.ndarray
    words: tuple[str, ...] | None
    notes: tuple[str, ...]


def read(
    path: str | pathlib.Path,
    *,
    inputs: str = "x",
    targets: str = "y",
    target: str | None = None,
    drop: str | None = None,
    most_numbers: int | None = None,
) -> Contents:
    """`load` to NumPy arrays in double precision, with what was done to get there.

    For what must come before the rounding to single precision, such as to standardise a column of large numbers.

    Args, raises: as of `load`; no number is too large. With ``most_numbers``, a file that holds more is read as a
    sample of its rows, drawn at random but always the same, in the memory of a few such samples: `Contents.notes` says
    so.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give the path of an .npz or .csv file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the path of an .npz or .csv file")
    suffix = path.suffix.lower()
    words: tuple[str, ...] | None = None
    notes: list[str] = []
    chosen: np.ndarray | None = None
    if suffix == ".npz":
        if target is not None or drop is not None:
            raise UserError(f"{path}: target and drop name columns of a table; of an archive name inputs and targets")
        x, y, chosen, notes = read_archive(path, inputs, targets, most_numbers)
    elif suffix in (".csv", ".tsv"):
        if (inputs, targets) != ("x", "y"):
            raise UserError(f"{path}: inputs and targets name arrays of an archive; of a table name the column target")
        x, y, words, notes = read_table(path, target, drop, most_numbers)
    else:
        raise UserError(f"{path}: expected a file that ends in .npz or .csv, or in .tsv")
    if x.ndim < 2 or y.ndim < 1 or len(x) != len(y) or x.size == 0:
        raise UserError(
            f"{path}: expected inputs (N, ...) and targets (N, ...) for N >= 1, got shapes {x.shape} and {y.shape}"
        )
    for name, values in (("inputs", x), ("targets", y)):
        bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
        if bad.size:
            raise UserError(
                f"{path}: {name} hold NaN or infinity in {bad.size} of {len(values)} rows, the first is row "
                f"{(bad if chosen is None else chosen[bad])[0] + 1}; drop or fill them"
            )
    return Contents(x, y, words, tuple(notes))
