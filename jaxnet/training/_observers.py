"""Observers of `fit` that leave something on disk: checkpoints, and the history as it grows."""

import contextlib
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import threading
import time
import types
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxnet.contract import UserError, check_count
from jaxnet.training._checkpoint import PARTIAL, Damaged, epochs_in, intact, orbax, restore, save
from jaxnet.training._history import FitProgress, History
from jaxnet.training._update import TrainState

# JAX names the call at which all processes have heard of SIGTERM by its number, which has to grow from run to run too.
_CALLS = itertools.count(1)


class Checkpoints:
    """An observer of `jaxnet.training.fit` that keeps the run on disk: a folder of checkpoints, named by epochs.

    A script that is killed and started again goes on where it was, to the same end, bit by bit::

        checkpoints = training.Checkpoints("run")
        start = checkpoints.resume(training.init_state(params, optax.adam(rate)))
        training.fit(loss, start, data, optax.adam, ..., observers=[checkpoints])

    When the run ends, by itself, by Ctrl-C, by SIGTERM or by an error, its last finished epoch is written too. Ctrl-C
    and SIGTERM wait until a checkpoint that is being written is whole; SIGKILL, which does not, leaves the one before.
    Needs Orbax: ``pip install 'jaxnet[checkpoint]'``.

    With several processes each of them has this observer. Ctrl-C or SIGTERM to one of them ends all, at the end of the
    same epoch, which is written; Ctrl-C a second time ends that process at once. An error of one writes nothing, as the
    others do not know of it.

    Args:
      folder: for this run alone, on a disk that all processes see.
      every: epochs from one checkpoint to the next.
      minutes: and so many minutes at least.
      keep: how many to keep, the newest.
      required: where a checkpoint cannot be written, end the run with the OSError; by default a warning says so, and
        training goes on.

    Raises:
      ValueError: a number is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int = 1,
        minutes: float = 0.0,
        keep: int = 3,
        required: bool = False,
    ) -> None:
        for name, value in {"every": every, "keep": keep}.items():
            check_count(name, value)
        if not minutes >= 0:
            raise ValueError(f"minutes: expected 0 or more, got {minutes}")
        self._folder, self._every, self._minutes = pathlib.Path(folder).absolute(), every, minutes
        self._keep, self._required = keep, required
        self._unsaved: FitProgress | None = None
        self._checked = False
        self._since = time.monotonic()
        self._asked = False
        self._before: tuple[signal.Signals, Any] | None = None

    def resume(self, start: TrainState) -> TrainState | FitProgress:
        """What `fit` is to start from: the newest whole checkpoint of the folder, or ``start`` where it has none.

        Raises:
          UserError: as `restore`.
        """
        return restore(self._folder, start) if epochs_in(self._folder) else start

    def __enter__(self) -> "Checkpoints":
        """Called by `fit`: clears away what a killed run left half-written, and listens for signals."""
        orbax()
        self._unsaved, self._checked, self._asked, self._since = None, False, False, time.monotonic()
        if jax.process_index() == 0 and self._folder.is_dir():
            for partial in self._folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(partial)
        alone: tuple[Any, Any, Any] = (signal.SIGTERM, signal.SIG_DFL, _end)
        # Of several processes JAX itself listens for SIGTERM.
        several = (signal.SIGINT, signal.default_int_handler, self._ask)
        number, usual, handler = alone if jax.process_count() == 1 else several
        # A handler of the caller's own is left alone.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is usual:
            self._before = number, signal.signal(number, handler)
        return self

    def __call__(self, progress: FitProgress) -> None:
        """Called after each epoch."""
        if not self._checked:
            self._check_free(progress.epoch)
        self._unsaved = progress
        late, end = self._agreed()
        if end or (late and progress.epoch % self._every == 0):
            self._save()
        if end:
            raise end

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: types.TracebackType | None) -> None:
        """Called by `fit` at its end: writes what is not written yet."""
        end = None
        try:
            if self._unsaved is not None and (kind is None or jax.process_count() == 1):
                self._save()
            if kind is None:  # else the others may be elsewhere
                end = self._agreed()[1]
        finally:
            self._unsaved = None
            if self._before is not None:
                signal.signal(*self._before)
                self._before = None
        if end:
            raise end

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        """Ctrl-C to one of several processes: the others have to hear of it first."""
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def _agreed(self) -> tuple[bool, BaseException | None]:
        """Whether it is time to write, and what ends the run here; the same in all processes."""
        late = time.monotonic() - self._since >= 60 * self._minutes
        if jax.process_count() == 1:
            return late, None
        from jax.experimental import multihost_utils

        # Clocks differ, and a checkpoint is written by all processes or by none.
        told = multihost_utils.process_allgather(np.array([late, self._asked]))
        if told[:, 1].any():
            return True, KeyboardInterrupt()
        listens = jax.config.jax_enable_preemption_service  # type: ignore[attr-defined]
        if listens and multihost_utils.reached_preemption_sync_point(next(_CALLS)):
            return True, SystemExit(128 + signal.SIGTERM)
        return bool(told[0, 0]), None

    def _check_free(self, epoch: int) -> None:
        """Raise if the folder holds what another run would overwrite; remove what is damaged there."""
        for later in [found for found in epochs_in(self._folder) if found >= epoch]:
            with contextlib.suppress(Damaged):
                intact(self._folder / str(later))
                raise UserError(
                    f"folder {self._folder}: holds a checkpoint of epoch {later} already, and this run is at {epoch}; "
                    "go on from it by Checkpoints.resume, or name another folder"
                )
            _remove(self._folder / str(later))
        self._checked = True

    def _save(self) -> None:
        run, self._unsaved = self._unsaved, None
        assert run is not None
        try:
            with _undisturbed():
                save(self._folder / str(run.epoch), run)
        except OSError as error:
            if self._required:
                raise
            warnings.warn(f"{error}; training goes on", RuntimeWarning, stacklevel=2)
            return
        self._since = time.monotonic()
        for epoch in epochs_in(self._folder)[: -self._keep]:
            _remove(self._folder / str(epoch))


def _remove(checkpoint: pathlib.Path) -> None:
    if jax.process_index() == 0:
        # Gone at once for whoever looks, and cleared away by the next run if this one is killed here.
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(checkpoint.name + PARTIAL)))


def _end(number: int, frame: types.FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM for as long; of several processes Ctrl-C alone.

    JAX's own handler of SIGTERM, which those have, disturbs nothing, and Python, which does not know of it, could not
    set it again.
    """
    came: list[int] = []
    held: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM)[: 2 if jax.process_count() == 1 else 1]:
            # What was not set from Python cannot be set again.
            if signal.getsignal(number) is not None:
                held[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for late in came[:1]:
            signal.raise_signal(late)


def _scalars(history: History, row: int) -> dict[str, float]:
    """An epoch's numbers by name."""
    parts = {"metrics": history.metrics, "validation": history.validation}
    named = {f"{part}/{name}": values for part, found in parts.items() for name, values in found.items()}
    return {name: float(values[row]) for name, values in {"loss": history.loss, **named}.items()}


class JsonLines:
    """An observer of `jaxnet.training.fit` that writes the history to a file, a line of JSON an epoch, as it goes.

    Such as ``{"epoch": 2, "step": 8, "loss": 0.7, "metrics/accuracy": 0.8, "validation/loss": 0.9}``; NaN and
    infinities are the strings "nan", "inf" and "-inf". Each line is written when its epoch ends, so that a killed run's
    can be read. A run that goes on writes over the lines of its own epochs and keeps those before.

    Args:
      path: the file; of several processes, the first writes it.

    Raises:
      UserError: when a run begins, the file holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = pathlib.Path(path)
        self._file: io.TextIOWrapper | None = None

    def __enter__(self) -> "JsonLines":
        """Called by `fit`: sees whether the file is one of these."""
        self._kept(0)
        return self

    def __call__(self, progress: FitProgress) -> None:
        """Called after each epoch."""
        if jax.process_index():
            return
        if self._file is None:
            self._file = self._begun(progress.history)
        else:
            self._file.write(_line(progress.history, -1))
        self._file.flush()

    def __exit__(self, *error: object) -> None:
        """Called by `fit` at its end."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begun(self, history: History) -> io.TextIOWrapper:
        """The file with all that is known, whole at every moment."""
        lines = [*self._kept(int(history.epoch[0])), *(_line(history, row) for row in range(len(history.epoch)))]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + PARTIAL)
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(self._path)
        return self._path.open("a", encoding="utf-8")

    def _kept(self, first: int) -> list[str]:
        """The lines of epochs before ``first``; the last may be cut off."""
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        lines = text.splitlines(keepends=True)
        try:
            return [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] < first]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"path {self._path}: holds something else than a history; name another file") from error


def _line(history: History, row: int) -> str:
    # What JSON has no number for is a word that Python's float reads.
    plain = {name: x if math.isfinite(x) else str(x) for name, x in _scalars(history, row).items()}
    return json.dumps({"epoch": int(history.epoch[row]), "step": int(history.step[row]), **plain}) + "\n"


class TensorBoard:
    """An observer of `jaxnet.training.fit` that writes each epoch's numbers for TensorBoard, against the step.

    Under the names "loss", "metrics/…" and "validation/…". A run that goes on hides what was written of the epochs that
    it repeats. Needs tensorboardX: ``pip install 'jaxnet[tensorboard]'``.

    Args:
      folder: where its event files go; of several processes, the first writes them.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = pathlib.Path(folder)
        self._writer: Any = None

    def __enter__(self) -> "TensorBoard":
        """Called by `fit`.

        Raises:
          ImportError: tensorboardX is not here.
        """
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError("TensorBoard needs tensorboardX: pip install 'jaxnet[tensorboard]'") from error
        self._make_writer = tensorboardX.SummaryWriter
        return self

    def __call__(self, progress: FitProgress) -> None:
        """Called after each epoch."""
        if jax.process_index():
            return
        step = int(progress.history.step[-1])
        if self._writer is None:
            self._writer = self._make_writer(str(self._folder), purge_step=step)
        for name, value in _scalars(progress.history, -1).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def __exit__(self, *error: object) -> None:
        """Called by `fit` at its end."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
