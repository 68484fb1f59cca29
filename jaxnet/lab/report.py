"""Records to tables on a terminal and files in a folder."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxnet.contract import UserError
from jaxnet.lab import plots
from jaxnet.lab._page import number, page
from jaxnet.lab.record import Record

if TYPE_CHECKING:
    from rich.table import Table


def tables(record: Record) -> "list[Table]":
    """The record's rows, and its claims with their verdicts, as rich tables."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    found = []
    if record.rows:
        table = Table(
            "quantity", "value", "remark", title=escape(record.question), box=SIMPLE_HEAD, title_justify="left"
        )
        table.columns[1].justify = "right"
        for name, value, remark in record.rows:
            table.add_row(escape(name), number(value), escape(remark))
        found.append(table)
    if record.claims:
        title = None if found else escape(record.question)
        table = Table(
            "claim",
            "predicted",
            "measured",
            "bound",
            "verdict",
            title=title,
            box=SIMPLE_HEAD,
            title_justify="left",
        )
        for column in table.columns[1:3]:
            column.justify = "right"
        for claim in record.claims:
            verdict = "[green]pass[/]" if claim.passed else "[bold red]MISS[/]"
            table.add_row(claim.name, number(claim.predicted), number(claim.measured), claim.tolerance, verdict)
        found.append(table)
    return found


def answer(record: Record) -> list[str]:
    """What a person takes away, in sentences: the record's own, or how its claims fared."""
    missed = [claim.name for claim in record.claims if not claim.passed]
    if record.answer or not record.claims:
        return list(record.answer)
    if not missed:
        return [f"All {len(record.claims)} claims hold." if len(record.claims) > 1 else "The claim holds."]
    return [f"{len(missed)} of {len(record.claims)} claims do not hold: {'; '.join(missed)}."]


def write(record: Record, folder: pathlib.Path) -> list[pathlib.Path]:
    """``record.json``, ``report.html`` and one PNG a panel; each appears whole or not at all. Returns their paths.

    Raises:
      UserError: the folder cannot be written into.
    """
    written, figures = write_record(record, folder), list(_write_figures(record, folder))
    text, at = page(record, answer(record)), folder / "report.html"
    with _writing(folder):
        _write_text(at, text)
    return [written, at, *figures]


def _write_text(path: pathlib.Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_record(record: Record, folder: pathlib.Path) -> pathlib.Path:
    """``record.json`` alone, whole or not at all; what was made of the record that it replaces goes.

    Raises:
      UserError: the folder cannot be written into.
    """
    path = folder / "record.json"
    text = record.to_json() + "\n"
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _forget_figures(path)
        _write_text(path, text)
    return path


def read_record(folder: pathlib.Path) -> Record | None:
    """The record of a job that was broken off, or None where it left none.

    Raises:
      UserError: what lies in its place cannot be read.
    """
    path = folder / "record.json"
    if not path.exists():
        return None
    try:
        return Record.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be gone on with, {error}; start anew with --overwrite") from error


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder") from error


def _forget_figures(path: pathlib.Path) -> None:
    """Remove the figures of the record that is about to be replaced, so that no two runs' lie side by side."""
    try:
        names = [panel["name"] for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in (*(f"{name}.png" for name in names), "report.html"):
        (path.parent / pathlib.Path(name).name).unlink(missing_ok=True)


def _write_figures(record: Record, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for name, figure in plots.draw(record).items():
        path = folder / f"{name}.png"
        partial = path.with_suffix(".partial")
        with _writing(folder):
            figure.savefig(partial, format="png")
            partial.replace(path)
        yield path
