"""A user's own file to ``(inputs, targets)``."""

import csv
import pathlib
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np

from jaxnet.contract import Array, UserError


def load(
    path: str | pathlib.Path, *, inputs: str = "x", targets: str = "y", target: str | None = None
) -> tuple[Array, Array]:
    """Read a data set from an .npz archive (without pickle) or a .csv table with a header line.

    Args:
      path: the file.
      inputs: .npz: the name of the array of inputs, (N, ...).
      targets: .npz: the name of the array of targets, (N, ...).
      target: .csv: the column of targets; by default the last. All other columns are inputs.

    Returns:
      Inputs as floats, and targets: integers where every one is a whole number, else floats.

    Raises:
      OSError: the file is not there (FileNotFoundError), is a folder, or may not be opened.
      ValueError: its content cannot be read, an array or column is missing or not numeric, a value is NaN or
        infinite, or the lengths differ. The message names the problem and the mend.
    """
    x, y = read(path, inputs=inputs, targets=targets, target=target)
    for name, values in (("inputs", x), ("targets", y)):
        if np.abs(values).max() > jnp.finfo(jnp.result_type(float)).max:
            raise UserError(f"{path}: {name} hold numbers too large for {jnp.result_type(float)}; rescale them")
    whole = np.issubdtype(y.dtype, np.integer)
    return jnp.asarray(x, jnp.result_type(float)), jnp.asarray(y, jnp.int32 if whole else jnp.result_type(float))


def read(
    path: str | pathlib.Path, *, inputs: str = "x", targets: str = "y", target: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`load` to NumPy arrays in double precision, as the file has them; whole targets are int64.

    For what must come before the rounding to single precision, such as to standardise a column of large numbers.

    Args, raises: as of `load`; no number is too large.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give the path of an .npz or .csv file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the path of an .npz or .csv file")
    if path.suffix == ".npz":
        x, y = _load_npz(path, inputs, targets)
    elif path.suffix == ".csv":
        x, y = _load_csv(path, target)
    else:
        raise UserError(f"{path}: expected a file that ends in .npz or .csv")
    if x.ndim < 2 or y.ndim < 1 or len(x) != len(y) or x.size == 0:
        raise UserError(
            f"{path}: expected inputs (N, ...) and targets (N, ...) for N >= 1, got shapes {x.shape} and {y.shape}"
        )
    for name, values in (("inputs", x), ("targets", y)):
        bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
        if bad.size:
            raise UserError(
                f"{path}: {name} hold NaN or infinity in {bad.size} of {len(values)} rows, the first is row "
                f"{bad[0] + 1}; drop or fill them"
            )
    whole = np.all(y == np.round(y)) and np.abs(y).max() < 2**31
    return x, y.astype(np.int64) if whole else y


def _load_npz(path: pathlib.Path, inputs: str, targets: str) -> tuple[np.ndarray, np.ndarray]:
    unreadable = f"{path}: not a readable .npz archive; write it with numpy.savez"
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise UserError(unreadable)
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            found = {name: archive[name] for name in (inputs, targets) if name in names}
    # NumPy and zipfile have as many words for a damaged archive as it has places to be damaged in.
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        pickled = isinstance(error, ValueError) and "pickle" in str(error)
        raise UserError(
            f"{path}: holds Python objects; save plain numeric arrays" if pickled else unreadable
        ) from error
    except MemoryError as error:
        raise UserError(f"{path}: its arrays do not fit the memory") from error
    for name in (inputs, targets):
        if name not in found:
            raise UserError(f"{path}: no array named {name!r}; it holds {', '.join(names) or 'none'}")
    x, y = found[inputs], found[targets]
    for name, values in ((inputs, x), (targets, y)):
        if not isinstance(values, np.ndarray):
            raise UserError(f"{path}: {name!r} is not an array; write the archive with numpy.savez")
        if values.dtype.kind not in "biuf":
            raise UserError(f"{path}: array {name!r} is not numeric but {values.dtype}; save it as numbers")
    return x.astype(np.float64), y.astype(np.float64)


def _load_csv(path: pathlib.Path, target: str | None) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable .csv table; save it as UTF-8 text with commas") from error
    header = [name.strip() for name in header]
    if len(header) < 2 or not rows:
        raise UserError(f"{path}: expected a header line of two or more columns and rows below it")
    if all(_is_number(name) for name in header):
        raise UserError(f"{path}: its first line holds numbers only; begin with a header line of column names")
    target = header[-1] if target is None else target
    if target not in header:
        raise UserError(f"{path}: no column named {target!r}; it has {', '.join(header)}")
    table = np.empty((len(rows), len(header)))
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise UserError(f"{path}: row {i + 1} has {len(row)} values, its header {len(header)}; mend that row")
        for j, (name, text) in enumerate(zip(header, row, strict=True)):
            if not _is_number(text):
                raise UserError(f"{path}: column {name!r} is not numeric: {text!r} in row {i + 1}; drop or encode it")
            table[i, j] = float(text)
    column = header.index(target)
    return np.delete(table, column, axis=1), table[:, column]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
