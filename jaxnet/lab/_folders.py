"""Where results go: the folder that was named, or a new one for each run."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import numpy as np

from jaxnet.contract import UserError

HOME = pathlib.Path("jaxnet-out")


@contextlib.contextmanager
def folder_of(
    command: str, out: pathlib.Path | None, *, overwrite: bool = False, resume: bool = False
) -> Iterator[pathlib.Path]:
    """The folder for a run of a command: ``out``, or ``jaxnet-out/COMMAND-1``, -2 and so on, the first that is new.

    Without ``out``, a run that is resumed takes the latest there is. A folder that was made here and stays empty goes
    again.

    Raises:
      UserError: it cannot be made or written into, or holds something and is neither to be overwritten nor resumed.
    """
    first = jax.process_index() == 0
    if out is not None:
        if first:
            _check(out, overwrite or resume)
        yield out
        return
    folder = HOME / f"{command}-{_number(command, resume, first)}"
    try:
        yield folder
    finally:
        if first:
            # Both stay where they hold anything.
            with contextlib.suppress(OSError):
                folder.rmdir()
                HOME.rmdir()


def _number(command: str, resume: bool, first: bool) -> int:
    """Of the folder, the same for all processes."""
    number = 0
    if first:
        _check(HOME, may_hold=True)
        latest = max((int(n) for n in _numbers(command)), default=0)
        number = latest if resume and latest else _made(command, latest + 1)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        number = int(multihost_utils.broadcast_one_to_all(np.array(number)))
    return number


def _numbers(command: str) -> list[str]:
    names = [path.name for path in HOME.iterdir()] if HOME.is_dir() else []
    numbers = [name.removeprefix(f"{command}-") for name in names if name.startswith(f"{command}-")]
    return [number for number in numbers if number.isdecimal()]


def _made(command: str, number: int) -> int:
    """The first number from one on that nothing has, not even a run that began at the same moment."""
    HOME.mkdir(exist_ok=True)
    while True:
        try:
            (HOME / f"{command}-{number}").mkdir()
            return number
        except FileExistsError:
            number += 1


def _check(folder: pathlib.Path, may_hold: bool) -> None:
    """Better now than after the work: can a folder be made where it is wanted?"""
    try:
        parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not parent.is_dir():
            raise UserError(f"--out {folder}: {parent.name} is a file; name a folder")
        if folder.is_dir() and any(folder.iterdir()) and not may_hold:
            raise UserError(f"--out {folder}: is not empty; name another folder, or pass --overwrite")
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from error
