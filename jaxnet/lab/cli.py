"""Words on a command line to calls."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

import jaxnet
from jaxnet.contract import UserError
from jaxnet.lab import _compiled, _processes, doctor, experiments, report, spectrum, train
from jaxnet.lab import analyse as main_job
from jaxnet.lab._folders import folder_of
from jaxnet.lab._progress import Share
from jaxnet.lab._task import known
from jaxnet.lab._terminal import progress, show
from jaxnet.lab.record import Record

# 70 is EX_SOFTWARE of BSD's sysexits.h: an error inside the program. The last two are 128 and SIGINT, SIGPIPE.
DONE, CLAIM_FAILED, BAD_INPUT, BUG, INTERRUPTED, NO_READER = 0, 1, 2, 70, 130, 141


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    debug: bool = False
    """Show the traceback of an error in the input too."""
    json: bool = False
    """Print what was found as one JSON object, a job's record.json, and nothing else on standard output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output(Common):
    """Where results go."""

    out: pathlib.Path | None = None
    """The folder for record.json, report.html and figures; by default a new one a run: jaxnet-out/COMMAND-1, -2, …"""
    overwrite: bool = False
    """Write into a folder that is not empty; files of the same names are replaced."""
    open: bool = False
    """Show report.html in the browser at the end."""
    keep_programs: bool = True
    """Keep compiled programs in the user's cache folder, so that the next run of the kind need not compile them."""
    coordinator: str | None = None
    """With several processes: the first one's host:port; or auto, where Slurm, Open MPI or Kubernetes started them."""
    num_processes: int | None = None
    """With a coordinator's host:port: how many there are."""
    process_id: int | None = None
    """With a coordinator's host:port: which of them this is, from 0."""


@dataclasses.dataclass(frozen=True)
class Analyse(main_job.AnalyseConfig, Output):
    """Derive a task's learning rate from curvature and noise, train at it, and measure whether theory was right."""

    resume: bool = False
    """Go on with the job that was broken off in the folder, by default in the latest: what it finished is kept."""


@dataclasses.dataclass(frozen=True)
class Train(train.TrainConfig, Output):
    """Train a network at the rate that follows from curvature and noise, with checkpoints, a history and a report."""

    resume: bool = False
    """Go on with the run that was broken off in the folder, by default in the latest, at its newest checkpoint."""


@dataclasses.dataclass(frozen=True)
class Spectrum(spectrum.SpectrumConfig, Output):
    """Show the eigenvalues of a task's Hessian: their density, the largest of them, and each layer's largest."""


@dataclasses.dataclass(frozen=True)
class Experiment(Output):
    """Run one of the lectures' experiments, or all; a claim that fails makes the exit status 1."""

    name: tyro.conf.Positional[str]
    """An experiment that `jaxnet list` names, or all."""
    seed: int = 0
    """Of the experiment's randomness."""


@dataclasses.dataclass(frozen=True)
class List(Common):
    """Name the experiments and what they ask."""


@dataclasses.dataclass(frozen=True)
class Doctor(Common):
    """Tell versions, devices, memory, where programs are kept, and which extras are installed."""


Command = (
    Annotated[Analyse, tyro.conf.subcommand("analyse")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Spectrum, tyro.conf.subcommand("spectrum")]
    | Annotated[Experiment, tyro.conf.subcommand("experiment")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)

DESCRIPTION = """What should the learning rate be, and why? Derived from curvature and noise, held against training.

--version tells the versions of jaxnet and JAX, --tyro-print-completion SHELL what completes commands and options."""

A_BUG = (
    "jaxnet: this is a bug in jaxnet, not in your input; please report it at jaxnet's issue tracker, "
    "with the traceback above and what `jaxnet doctor` prints"
)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit status.

    0 done, 1 a claim failed, 2 bad input (a `UserError`: one line on stderr), 70 a bug (any other error: a traceback on
    stderr), 130 interrupted, 141 nobody reads on.
    """
    console, errors = Console(), Console(stderr=True, soft_wrap=True, highlight=False)
    # Not from the command: it may be what cannot be read.
    debug = "--debug" in arguments
    try:
        with _interruptible():
            status = _run(_parse(arguments), console) if arguments[:1] != ["--version"] else _version()
        sys.stdout.flush()
        return status
    except UserError as error:
        if debug:
            traceback.print_exc(file=sys.stderr)
        errors.print(f"jaxnet: {' '.join(str(error).split())}", markup=False)
        return BAD_INPUT
    except KeyboardInterrupt:
        errors.print("jaxnet: interrupted; what was finished is kept")
        return INTERRUPTED
    except BrokenPipeError:
        # As under `| head`. Python would try to write the rest when it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except Exception:
        traceback.print_exc(file=sys.stderr)
        errors.print(A_BUG, markup=False)
        return BUG


Job = Analyse | Train | Spectrum | Experiment


def _run(command: Job | List | Doctor, console: Console) -> int:
    if isinstance(command, List):
        return _list(command, console)
    if isinstance(command, Doctor):
        return _doctor(command, console)
    if isinstance(command, Experiment):
        known("experiment", command.name, [*experiments.names(), "all"])
    num_devices = getattr(command, "devices", None)
    together = command.coordinator, command.num_processes, command.process_id
    _processes.join(num_devices, *together, heeds_sigterm=isinstance(command, Train) and train.orbax_is_here())
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the figures need matplotlib: pip install 'jaxnet[app]'")
    name, resume = type(command).__name__.lower(), getattr(command, "resume", False)
    where = folder_of(name, command.out, overwrite=command.overwrite, resume=resume)
    with where as folder, _compiled.kept(command.keep_programs):
        return _work(command, folder, report.read_record(folder) if resume else None, console)


def _work(command: Job, folder: pathlib.Path, begun: Record | None, console: Console) -> int:
    try:
        if isinstance(command, Experiment):
            return _experiment(command, folder, console)
        jobs: dict[type, tuple[Any, Callable[..., Iterator[Record]]]] = {
            Analyse: (main_job.AnalyseConfig, functools.partial(main_job.stages, begun=begun)),
            Train: (train.TrainConfig, functools.partial(train.stages, begun=begun, folder=folder)),
            Spectrum: (spectrum.SpectrumConfig, spectrum.stages),
        }
        return _staged(command, *jobs[type(command)], folder, console)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError("out of memory; take a smaller network or fewer examples") from error
        if jax.process_count() > 1:
            raise UserError(f"another process ended, or cannot be reached: {str(error).splitlines()[0]}") from error
        raise


def _parse(arguments: Sequence[str]) -> Job | List | Doctor:
    """The command; tyro's boxed complaint is brought to one line. Its help, and its completions, are its own."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(Command, prog="jaxnet", args=list(arguments), description=DESCRIPTION)
    except ImportError as error:  # of a shell that tyro leaves to another package
        raise UserError(str(error)) from error
    except SystemExit as end:
        if not end.code:
            raise
        # Without the box, in whatever alphabet: its lid with a title, its sides, and the rules in it.
        inside = " ".join(re.sub("[╰╯│]", "", line) for line in printed.getvalue().splitlines()[1:])
        parts = [" ".join(part.split()) for part in re.split("[─-]{4,}", inside)]
        raise UserError("; ".join(part.rstrip(".") for part in parts if part)) from None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the work wherever it falls.

    Python drops an exception of a destructor or of a garbage collector's callback (JAX has one), a KeyboardInterrupt
    too: the work would go on as if nobody had asked. It is sent again a moment later, from outside.
    """
    before = sys.unraisablehook

    def send_again(dropped: "sys.UnraisableHookArgs") -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
        else:
            before(dropped)

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _finish(record: Record, folder: pathlib.Path, command: Job, console: Console, seconds: float) -> None:
    """Tell what was found, and write it; of several processes the first does."""
    if jax.process_index() > 0:
        return
    if not command.json:
        for sentence in report.answer(record):
            show(console, sentence, style="bold", markup=False, highlight=False)
        show(console, f"Measured in {seconds:.0f} s.", style="dim", highlight=False)
        for table in report.tables(record):
            show(console, table)
        for claim in record.claims:
            if not claim.passed:
                show(console, f"MISS {record.name}: {claim.name}", style="bold red", markup=False)
    paths = report.write(record, folder)
    if not command.json:
        show(console, f"{folder}: {', '.join(path.name for path in paths)}", highlight=False, markup=False)


def _end(records: dict[str, Record], folder: pathlib.Path, command: Job) -> None:
    """What is left when all is told: the records for another program, the report for the browser."""
    if jax.process_index() > 0:
        return
    if command.json:
        found = {name: json.loads(record.to_json()) for name, record in records.items()}
        several = isinstance(command, Experiment) and command.name == "all"
        _print_json(found if several else next(iter(found.values())))
        print(f"jaxnet: {folder}", file=sys.stderr)
    if command.open:
        page = folder / "report.html"
        place = (page if page.exists() else folder).resolve()
        if not webbrowser.open(place.as_uri()):
            print(f"jaxnet: there is no browser to open {place}", file=sys.stderr)


def _print_json(value: Any) -> None:
    """In ASCII, which every terminal and pipe carries."""
    print(json.dumps(value, indent=1))


def _staged(
    command: Job, make_config: Any, stages: Callable[..., Iterator[Record]], folder: pathlib.Path, console: Console
) -> int:
    """Run a job that yields its record as it grows, and keep each, so that even a killed one leaves what it had."""
    config = make_config(**{field.name: getattr(command, field.name) for field in dataclasses.fields(make_config)})
    record, begins = None, time.monotonic()
    try:
        with jax.enable_x64(config.dtype == "float64"), progress() as on_stage:
            for stage in stages(config, on_stage):
                record = stage
                if jax.process_index() == 0:
                    report.write_record(record, folder)
    finally:
        if record is not None:
            _finish(record, folder, command, console, time.monotonic() - begins)
            _end({record.name: record}, folder, command)
    # The main job's misses are findings; a training that did not train is not done.
    return CLAIM_FAILED if isinstance(command, Train) and not (record and record.passed) else DONE


def _experiment(command: Experiment, folder: pathlib.Path, console: Console) -> int:
    several = command.name == "all"
    chosen = experiments.names() if several else [command.name]
    records: dict[str, Record] = {}
    with progress() as on_stage:
        for name, (first, last) in zip(chosen, itertools.pairwise(experiments.parts(chosen)), strict=True):
            share: Share = lambda done: on_stage(name, first + (last - first) * done)
            share(0.0)
            begins = time.monotonic()
            records[name] = experiments.run(name, seed=command.seed, share=share)
            _finish(records[name], folder / name if several else folder, command, console, time.monotonic() - begins)
    _end(records, folder, command)
    return DONE if all(record.passed for record in records.values()) else CLAIM_FAILED


def _version() -> int:
    print(f"jaxnet {jaxnet.__version__}, JAX {jax.__version__}")
    return DONE


def _list(command: List, console: Console) -> int:
    return _told(command, {name: experiments.question(name) for name in experiments.names()}, console)


def _doctor(command: Doctor, console: Console) -> int:
    found = doctor.examine()
    return _told(command, found if command.json else dict(doctor.lines(found)), console)


def _told(command: Common, found: dict[str, Any], console: Console) -> int:
    if command.json:
        _print_json(found)
        return DONE
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in found.items():
        table.add_row(name, Text(words))
    show(console, table)
    return DONE
