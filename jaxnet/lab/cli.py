"""Words on a command line to calls."""

import contextlib
import dataclasses
import importlib.util
import io
import pathlib
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxnet.contract import UserError
from jaxnet.lab import _compiled, experiments, report, spectrum
from jaxnet.lab import analyse as main_job
from jaxnet.lab._task import OnStage, known
from jaxnet.lab.record import Record, versions

# 70 is EX_SOFTWARE of BSD's sysexits.h: an error inside the program.
DONE, CLAIM_FAILED, BAD_INPUT, BUG, INTERRUPTED = 0, 1, 2, 70, 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    debug: bool = False
    """Show the traceback of an error in the input too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output(Common):
    """Where results go."""

    out: pathlib.Path = pathlib.Path("jaxnet-out")
    """The folder for record.json and the figures."""
    overwrite: bool = False
    """Write into a folder that is not empty; files of the same names are replaced."""
    keep_programs: bool = True
    """Keep compiled programs in the user's cache folder, so that the next run of the kind need not compile them."""


@dataclasses.dataclass(frozen=True)
class Analyse(main_job.AnalyseConfig, Output):
    """Derive a task's learning rate from curvature and noise, train at it, and measure whether theory was right."""


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
    """Tell versions, devices and which extras are installed."""


Command = (
    Annotated[Analyse, tyro.conf.subcommand("analyse")]
    | Annotated[Spectrum, tyro.conf.subcommand("spectrum")]
    | Annotated[Experiment, tyro.conf.subcommand("experiment")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)

DESCRIPTION = "What should the learning rate be, and why? Derived from curvature and noise, held against training."

A_BUG = (
    "jaxnet: this is a bug in jaxnet, not in your input; please report it at jaxnet's issue tracker, "
    "with the traceback above and what `jaxnet doctor` prints"
)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit status.

    0 done, 1 a claim failed, 2 bad input (a `UserError`: one line on stderr), 70 a bug (any other error: a traceback on
    stderr), 130 interrupted.
    """
    console, errors = Console(), Console(stderr=True, soft_wrap=True, highlight=False)
    # Not from the command: it may be what cannot be read.
    debug = "--debug" in arguments
    try:
        with _interruptible():
            return _run(_parse(arguments), console)
    except UserError as error:
        if debug:
            traceback.print_exc(file=sys.stderr)
        errors.print(f"jaxnet: {' '.join(str(error).split())}", markup=False)
        return BAD_INPUT
    except KeyboardInterrupt:
        errors.print("jaxnet: interrupted; what was finished is kept")
        return INTERRUPTED
    except Exception:
        traceback.print_exc(file=sys.stderr)
        errors.print(A_BUG, markup=False)
        return BUG


Commands = Analyse | Spectrum | Experiment | List | Doctor


def _run(command: Commands, console: Console) -> int:
    if isinstance(command, List):
        return _list(console)
    if isinstance(command, Doctor):
        return _doctor(console)
    _check_out(command)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the figures need matplotlib: pip install 'jaxnet[app]'")
    _devices()
    with _compiled.kept(command.keep_programs):
        return _work(command, console)


def _work(command: Analyse | Spectrum | Experiment, console: Console) -> int:
    try:
        if isinstance(command, Analyse):
            return _staged(command, main_job.AnalyseConfig, main_job.stages, console)
        if isinstance(command, Spectrum):
            return _staged(command, spectrum.SpectrumConfig, spectrum.stages, console)
        return _experiment(command, console)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError("out of memory; take a smaller network or fewer examples") from error
        raise


def _parse(arguments: Sequence[str]) -> Commands:
    """The command; tyro's boxed complaint is brought to one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(Command, prog="jaxnet", args=list(arguments), description=DESCRIPTION)
    except SystemExit as end:
        if not end.code:
            raise
        # Without the box, in whatever alphabet: its lid with a title, its sides, and the rules in it.
        lines = printed.getvalue().splitlines()
        complaint = re.sub(r"[─-]{4,}|[╰╯│]", "", " ".join(lines[1:] or lines))
        raise UserError(" ".join(complaint.split())) from None


def _check_out(output: Output) -> None:
    """Better now than after the work: can a folder be made where it is wanted?"""
    folder = output.out
    try:
        parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not parent.is_dir():
            raise UserError(f"--out {folder}: {parent.name} is a file; name a folder")
        if folder.is_dir() and any(folder.iterdir()) and not output.overwrite:
            raise UserError(f"--out {folder}: is not empty; name another folder, or pass --overwrite")
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from error


def _devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except RuntimeError as error:
        raise UserError(f"JAX cannot start: {error}") from error


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


@contextlib.contextmanager
def _bar() -> Iterator[OnStage]:
    """A bar on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage, share: None
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task, stages = bar.add_task("starting", total=1.0), ["starting"]

        def on_stage(stage: str, share: float) -> None:
            stages.append(stage)
            bar.update(task, description=stage, completed=share)

        compiling = lambda now: bar.update(task, description=f"{stages[-1]}: compiling …" if now else stages[-1])
        with _compiled.announced(compiling):
            yield on_stage


def _finish(record: Record, folder: pathlib.Path, console: Console) -> None:
    for table in report.tables(record):
        console.print(table)
    for claim in record.claims:
        if not claim.passed:
            console.print(f"MISS {record.name}: {claim.name}", style="bold red", markup=False)
    paths = report.write(record, folder)
    console.print(f"{folder}: {', '.join(path.name for path in paths)}", soft_wrap=True, highlight=False, markup=False)


def _staged(command: Any, make_config: Any, stages: Callable[..., Iterator[Record]], console: Console) -> int:
    """Run a job that yields its record as it grows, and keep the last even if it is interrupted."""
    config = make_config(**{field.name: getattr(command, field.name) for field in dataclasses.fields(make_config)})
    record = None
    try:
        with jax.enable_x64(config.dtype == "float64"), _bar() as on_stage:
            for stage in stages(config, on_stage):
                record = stage
    finally:
        if record is not None:
            _finish(record, command.out, console)
    return DONE


def _experiment(command: Experiment, console: Console) -> int:
    chosen = experiments.names() if command.name == "all" else [command.name]
    known("experiment", command.name, [*experiments.names(), "all"])
    passed = True
    with _bar() as on_stage:
        for number, name in enumerate(chosen):
            on_stage(name, number / len(chosen))
            record = experiments.run(name, seed=command.seed)
            _finish(record, command.out / name if command.name == "all" else command.out, console)
            passed = passed and record.passed
    return DONE if passed else CLAIM_FAILED


def _list(console: Console) -> int:
    for name in experiments.names():
        console.print(f"{name:16} {experiments.question(name)}", soft_wrap=True, highlight=False)
    return DONE


EXTRAS = {
    "app": ("tyro", "rich", "matplotlib", "sklearn"),
    "table": ("pandas",),
    "data": ("mnist1d", "mlxtend"),
    "stochastic": ("matfree",),
}


def _doctor(console: Console) -> int:
    for name, version in versions().items():
        console.print(f"{name:10} {version}", highlight=False)
    console.print(f"devices    {', '.join(str(device) for device in _devices())}", highlight=False)
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        state = f"lacks {', '.join(missing)}: pip install 'jaxnet\\[{extra}]'" if missing else "installed"
        console.print(f"extra {extra:10} {state}", highlight=False)
    return DONE
