"""Words on a command line to calls."""

import contextlib
import dataclasses
import functools
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
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from jaxnet.contract import UserError
from jaxnet.lab import _compiled, experiments, report, spectrum
from jaxnet.lab import analyse as main_job
from jaxnet.lab._task import OnStage, check_count, known
from jaxnet.lab.record import Record, versions

# 70 is EX_SOFTWARE of BSD's sysexits.h: an error inside the program.
DONE, CLAIM_FAILED, BAD_INPUT, BUG, INTERRUPTED = 0, 1, 2, 70, 130
# Seconds without a sign of life after which JAX ends the processes that wait for another.
HEARTBEAT = 20


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
    coordinator: str | None = None
    """Where several processes run this command together: the first one's host:port; or auto, where Slurm, Open MPI or
    Kubernetes started them."""
    num_processes: int | None = None
    """With a coordinator's host:port: how many there are."""
    process_id: int | None = None
    """With a coordinator's host:port: which of them this is, from 0."""


@dataclasses.dataclass(frozen=True)
class Analyse(main_job.AnalyseConfig, Output):
    """Derive a task's learning rate from curvature and noise, train at it, and measure whether theory was right."""

    resume: bool = False
    """Go on with the job that was broken off in the folder: what it finished is kept."""


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
    _join(command)
    _devices()
    resumed = isinstance(command, Analyse) and command.resume
    if jax.process_index() == 0:
        _check_out(command, resumed)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the figures need matplotlib: pip install 'jaxnet[app]'")
    with _compiled.kept(command.keep_programs):
        return _work(command, console, resumed)


def _work(command: Analyse | Spectrum | Experiment, console: Console, resumed: bool) -> int:
    try:
        if isinstance(command, Analyse):
            begun = report.read_record(command.out) if resumed else None
            return _staged(command, main_job.AnalyseConfig, functools.partial(main_job.stages, begun=begun), console)
        if isinstance(command, Spectrum):
            return _staged(command, spectrum.SpectrumConfig, spectrum.stages, console)
        return _experiment(command, console)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError("out of memory; take a smaller network or fewer examples") from error
        if jax.process_count() > 1:
            raise UserError(f"another process ended, or cannot be reached: {str(error).splitlines()[0]}") from error
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


def _check_out(output: Output, resumed: bool) -> None:
    """Better now than after the work: can a folder be made where it is wanted?"""
    folder = output.out
    try:
        parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not parent.is_dir():
            raise UserError(f"--out {folder}: {parent.name} is a file; name a folder")
        if folder.is_dir() and any(folder.iterdir()) and not (output.overwrite or resumed):
            raise UserError(f"--out {folder}: is not empty; name another folder, or pass --overwrite")
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from error


def _join(command: Output) -> None:
    """Make the devices asked for, and join the other processes, before JAX starts."""
    num, processes = getattr(command, "devices", None), command.num_processes or 1
    if num is not None:
        check_count("devices", num)
        if num % processes:
            raise UserError(f"devices: expected a multiple of {processes}, the number of processes, got {num}")
        # Where JAX has started already, what it has has to do.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", num // processes)
    if command.coordinator is not None:
        by_hand = command.coordinator != "auto"
        if by_hand and (command.num_processes is None or command.process_id is None):
            raise UserError("coordinator: with a host:port, --num-processes and --process-id have to be given too")
        try:
            jax.distributed.initialize(
                command.coordinator if by_hand else None,
                command.num_processes,
                command.process_id,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"coordinator: the processes cannot meet: {error}") from error
    if num is not None and len(_devices()) < num:
        raise UserError(f"devices: expected 1 to {len(_devices())}, which there are, got {num}")


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
    if not console.is_terminal or jax.process_index() > 0:
        yield lambda stage, share: None
        return
    columns = (BarColumn(), TimeElapsedColumn(), TimeLeft(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task, stages = bar.add_task("starting", total=1.0, at=0.0), ["starting"]

        def on_stage(stage: str, share: float) -> None:
            stages.append(stage)
            bar.update(task, description=stage, completed=share, at=bar.tasks[task].elapsed or 0.0)

        compiling = lambda now: bar.update(task, description=f"{stages[-1]}: compiling …" if now else stages[-1])
        with _compiled.announced(compiling):
            yield on_stage


class TimeLeft(ProgressColumn):
    """What is left at the pace so far, counted down between one stage and the next."""

    def render(self, task: Task) -> Text:
        """About so long, or nothing while nothing is known."""
        share, at = task.completed, task.fields["at"]
        if not share:
            return Text("")
        left = max(0.0, at / share - (task.elapsed or at))
        words = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        return Text(f"about {words} left", style="progress.remaining")


def _finish(record: Record, folder: pathlib.Path, console: Console) -> None:
    if jax.process_index() > 0:
        return
    for sentence in report.answer(record):
        console.print(sentence, style="bold", markup=False, highlight=False)
    for table in report.tables(record):
        console.print(table)
    for claim in record.claims:
        if not claim.passed:
            console.print(f"MISS {record.name}: {claim.name}", style="bold red", markup=False)
    paths = report.write(record, folder)
    console.print(f"{folder}: {', '.join(path.name for path in paths)}", soft_wrap=True, highlight=False, markup=False)


def _staged(command: Any, make_config: Any, stages: Callable[..., Iterator[Record]], console: Console) -> int:
    """Run a job that yields its record as it grows, and keep each, so that even a killed one leaves what it had."""
    config = make_config(**{field.name: getattr(command, field.name) for field in dataclasses.fields(make_config)})
    record = None
    try:
        with jax.enable_x64(config.dtype == "float64"), _bar() as on_stage:
            for stage in stages(config, on_stage):
                record = stage
                if jax.process_index() == 0:
                    report.write_record(record, command.out)
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
    "checkpoint": ("orbax",),
    "tensorboard": ("tensorboardX",),
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
