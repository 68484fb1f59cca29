"""A table of text, as spreadsheets and pandas write it, to numbers."""

import collections
import csv
import io
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import numpy as np

from jaxnet.contract import UserError
from jaxnet.data._archives import of_sample, sampled
from jaxnet.data._bundled import need

SEPARATORS = "\t;|,"
NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
# A person sees a number: with foreign digits, marks between the thousands, a decimal comma, a currency, a per cent.
NEARLY_A_NUMBER = r"[+-]?[$€£]?\s*\d[\d\s.,'_]*[%$€£]?"
MARKED = r"^\s*[+-]?\d*([.,])\d+(?:[eE][+-]?\d+)?\s*$"
DATE = r"(?:\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})(?:[ T].*)?"
# An index: pandas writes it below an empty name, and when it reads that back and writes it again, below this one.
NAMELESS = r"\(column \d+\)|Unnamed: \d+(?:\.\d+)?"
# Beside what pandas takes for a missing cell.
MISSING = ["", "?", "NA", "NaN", "nan"]
MOST_WORDS = 1000


def read_table(
    path: pathlib.Path, target: str | None, drop: str | None, most_numbers: int | None = None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None, list[str]]:
    """Inputs (N, D), targets (N,) or (N, M), the words they stand for, and what was done to get there."""
    table, num_rows, notes = _read(path, most_numbers)
    for name in _named(path, "drop", drop, table):
        del table[name]
    _leave_out_nameless(path, table, notes)
    wanted = _named(path, "target", target, table) or list(table)[-1:]
    for name in [name for name in table if table[name].isna().all()]:
        if name in wanted:
            raise UserError(f"{path}: column {name!r} is empty; name another target")
        notes.append(f"column {name!r} is left out: it is empty")
        del table[name]
    # One-hot words are the wider: a second look, now that the columns are known.
    fewer = sampled(len(table), sum(_width(table[name]) for name in table), most_numbers)
    table = table if fewer is None else table.iloc[fewer]
    if len(table) < num_rows:
        notes.insert(0, of_sample(len(table), num_rows))
    table = _complete_rows(path, table, notes)
    inputs = [_input(path, name, table[name], notes) for name in table if name not in wanted]
    targets = [_target(path, name, table[name], notes) for name in wanted]
    if not sum(values.shape[1] for values in inputs):
        raise UserError(f"{path}: no column is left as an input; {'; '.join(notes) or 'all are targets or dropped'}")
    if len(targets) == 1:
        return np.concatenate(inputs, axis=1), *targets[0], notes
    for name, (_, words) in zip(wanted, targets, strict=True):
        if words:
            raise UserError(f"{path}: column {name!r} holds words; where there are several targets all must be numbers")
    return np.concatenate(inputs, axis=1), np.stack([values for values, _ in targets], axis=1), None, notes


def _read(path: pathlib.Path, most_numbers: int | None) -> tuple[Any, int, list[str]]:
    """The table with the types that pandas finds, its index the rows' numbers from 1 on, or a sample of its rows; and
    how many rows there are."""
    pandas = need("pandas", "table", "a table is read with")
    try:
        header, separator, comma, num_rows = _shape(path)
        chosen = sampled(num_rows, len(header), most_numbers)
        table = pandas.read_csv(
            path if chosen is None else _some_rows(path, separator, chosen),
            sep=separator,
            decimal="," if comma else ".",
            header=0,
            names=header,
            index_col=False,
            skipinitialspace=True,
            na_values=MISSING,
            encoding="utf-8-sig",
            dtype_backend="numpy_nullable",
            low_memory=False,
        )
    except (UnicodeDecodeError, csv.Error, pandas.errors.ParserError) as error:
        raise UserError(f"{path}: not a readable table; save it as UTF-8 text, one line a row") from error
    table.index = table.index + 1 if chosen is None else chosen + 1
    for name in table.select_dtypes("string"):
        # pandas knows a missing cell by its text, padding included.
        text = table[name].str.strip()
        table[name] = text.mask(text.isin(MISSING))
    if all(re.fullmatch(NUMBER, name) or (table[name].astype(str) == name).any() for name in table):
        raise UserError(f"{path}: its first line looks like the others; begin with a header line of column names")
    return table, num_rows, ["decimal commas are read as points"] if comma else []


def _lines(file: Iterable[str], separator: str) -> Iterator[list[str]]:
    """The header's cells and each row's, but for empty lines."""
    rows = csv.reader(file, delimiter=separator, skipinitialspace=True)
    return (row for row in rows if len(row) > 1 or "".join(row).strip())


def _some_rows(path: pathlib.Path, separator: str, chosen: np.ndarray) -> TextIO:
    """The header and some rows as a table by itself."""
    text, wanted = io.StringIO(newline=""), np.zeros(chosen[-1] + 2, bool)
    wanted[0] = wanted[chosen + 1] = True
    with path.open(newline="", encoding="utf-8-sig") as file:
        csv.writer(text, delimiter=separator).writerows(itertools.compress(_lines(file, separator), wanted))
    text.seek(0)
    return text


def _shape(path: pathlib.Path) -> tuple[list[str], str, bool, int]:
    """The columns' names, what separates them, whether numbers have a decimal comma, and how many rows there are.

    pandas fills up a short row and renames a column whose name is there twice: both are refused here.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = list(itertools.islice((line for line in file if line.strip()), 2))
        widths = {sep: [len(row) for row in _lines(lines, sep)] or [0] for sep in SEPARATORS}
        fits = lambda sep: widths[sep][0] > 1 and len(set(widths[sep])) == 1
        separator = max(SEPARATORS, key=lambda sep: (fits(sep), widths[sep][0]))
        file.seek(0)
        filled = _lines(file, separator)
        header = [name.strip() for name in next(filled, [])]
        count, marks = 0, set[str]()
        for count, row in enumerate(filled, start=1):
            if len(row) != len(header):
                raise UserError(f"{path}: row {count} has {len(row)} values, its header {len(header)}; mend that row")
            if separator == ";":
                marks.update(mark for text in row for mark in re.findall(MARKED, text))
    if len(header) < 2 or not count:
        raise UserError(f"{path}: expected a header line of two or more columns and rows below it")
    if all(re.fullmatch(NUMBER, name) for name in header):
        raise UserError(f"{path}: its first line holds numbers only; begin with a header line of column names")
    name, times = collections.Counter(header).most_common(1)[0]
    if times > 1:
        places = ", ".join(str(i) for i, other in enumerate(header, start=1) if other == name)
        shared = f"the same name {name!r}" if name else "no name"
        raise UserError(f"{path}: columns {places} have {shared}; give each a name of its own")
    return [name or f"(column {i})" for i, name in enumerate(header, start=1)], separator, marks == {","}, count


def _named(path: pathlib.Path, option: str, names: str | None, table: Any) -> list[str]:
    """The columns that an option names, one or several with commas between them."""
    if names is None or names in table:
        return [] if names is None else [names]
    found = [name.strip() for name in names.split(",")]
    for name in found:
        if name not in table:
            raise UserError(f"{path}: no column named {name!r}; it has {', '.join(table)}")
        if found.count(name) > 1:
            raise UserError(f"{path}: {option} names the column {name!r} more than once")
    return found


def _leave_out_nameless(path: pathlib.Path, table: Any, notes: list[str]) -> None:
    """Drop columns without a name: an index in front, or one that is empty. What else it may be has to get a name."""
    in_front = True
    for name in list(table):
        if not re.fullmatch(NAMELESS, name):
            in_front = False
            continue
        empty = table[name].isna().all()
        if not empty and not (in_front and table[name].dtype.kind in "iuO"):
            raise UserError(f"{path}: {name} has no name and is no index; name it in the header")
        notes.append(
            f"column {name!r} is left out: {'it is empty' if empty else 'in front, without a name, it is an index'}"
        )
        del table[name]


def _complete_rows(path: pathlib.Path, table: Any, notes: list[str]) -> Any:
    missing = table.isna()
    gaps = missing.any(axis=1)
    if not gaps.any():
        return table
    counts = missing.sum()
    if 2 * gaps.sum() >= len(table):
        worst = counts.idxmax()
        raise UserError(
            f"{path}: {gaps.sum()} of {len(table)} rows have an empty or NA cell, column {worst!r} {counts[worst]} of "
            "them; fill the cells, or leave a column out by drop"
        )
    where = ", ".join(f"{name!r}" for name in table if counts[name])
    notes.append(f"rows left out, {gaps.sum()} of {len(table)}: a cell is empty or NA in {where}")
    return table[~gaps]


def _width(column: Any) -> int:
    """How many numbers a row of it may become."""
    return 1 if column.dtype.kind in "biuf" else min(column.nunique(), MOST_WORDS)


def _input(path: pathlib.Path, name: str, column: Any, notes: list[str]) -> np.ndarray:
    """Numbers (N, 1), or words one-hot, (N, K); (N, 0) where nothing can be learnt from the column."""
    n = len(column)
    values = _numbers(path, name, column, notes)
    if values is not None:
        # By the rows' own numbers: some may be left out, or not be in the sample.
        if n > 2 and any(np.array_equal(values, column.index - start) for start in (0, 1)):
            notes.append(f"column {name!r} counts the rows and is an input all the same, unless drop names it")
        return values.astype(np.float64)[:, None]
    words, codes = np.unique(column.to_numpy(str), return_inverse=True)
    useless = {n: "each row has a word of its own", 1: "all rows have the same word"}.get(len(words))
    if column.str.fullmatch(DATE).all():
        useless = "it holds dates; write them as numbers to use them"
    if useless:
        notes.append(f"column {name!r} is left out: {useless}")
        return np.empty((n, 0))
    if len(words) > MOST_WORDS:
        raise UserError(f"{path}: column {name!r} holds {len(words)} different words; leave it out by drop")
    shown = ", ".join(words[:6]) + (", …" if len(words) > 6 else "")
    notes.append(f"column {name!r} is {len(words)} inputs, 0 or 1, one for each word: {shown}")
    return np.eye(len(words))[codes]


def _target(path: pathlib.Path, name: str, column: Any, notes: list[str]) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Numbers (N,), or the words' places (N,) in the sorted list of them, and that list."""
    values = _numbers(path, name, column, notes)
    if values is not None:
        return values, None
    if column.str.fullmatch(DATE).all():
        raise UserError(f"{path}: column {name!r} holds dates, which cannot be a target; write them as numbers")
    words, codes = np.unique(column.to_numpy(str), return_inverse=True)
    return codes.astype(np.int64), tuple(words.tolist())


def _numbers(path: pathlib.Path, name: str, column: Any, notes: list[str]) -> np.ndarray | None:
    """Integers or floats (N,); None if the column holds words.

    Raises:
      UserError: it holds both, something that is nearly a number, or infinity.
    """
    kind = column.dtype.kind
    if kind == "b":
        notes.append(f"column {name!r}: False is 0, True is 1")
    if kind in "bi":
        return column.to_numpy(np.int64)
    if kind not in "uf":
        if column.str.fullmatch(DATE).all():
            return None
        plain = column.str.fullmatch(NUMBER)
        odd = column[~plain] if plain.any() else column[column.str.fullmatch(NEARLY_A_NUMBER)]
        if len(odd):
            raise UserError(
                f"{path}: column {name!r} is not numeric: {odd.iloc[0]!r} in row {odd.index[0]}; write plain numbers, "
                "such as 1234.5, or words alone, or leave the column out by drop"
            )
        if not plain.any():
            return None
    values = column.to_numpy(np.float64)
    infinite = np.flatnonzero(np.isinf(values))
    if infinite.size:
        raise UserError(
            f"{path}: column {name!r} holds infinity in {infinite.size} of {len(values)} rows, the first is "
            f"row {column.index[infinite[0]]}; mend or empty those cells"
        )
    return values
