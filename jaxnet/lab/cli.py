"""Words on a command line to calls."""

import contextlib
import dataclasses
import importlib.util
import io
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxnet.lab import analyse as main_job
from jaxnet.lab import experiments, report, spectrum
from jaxnet.lab._task import known
from jaxnet.lab.record import Record, versions

DONE, CLAIM_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go."""

    out: pathlib.Path = pathlib.Path("jaxnet-out")
    """The folder for record.json and the figures."""
    overwrite: bool = False
    """Write into a folder that is not empty; files of the same names are replaced."""


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
class List:
    """Name the experiments and what they ask."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Tell versions, devices and which extras are installed."""


Command = (
    Annotated[Analyse, tyro.conf.subcommand("analyse")]
    | Annotated[Spectrum, tyro.conf.subcommand("spectrum")]
    | Annotated[Experiment, tyro.conf.subcommand("experiment")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)

DESCRIPTION = "What should the learning rate be, and why? Derived from curvature and noise, held against training."

BAD = (ValueError, TypeError, OSError, ImportError)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit status: 0, 1 a claim failed, 2 bad input, 130 interrupted."""
    console, errors = Console(), Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        command = _parse(arguments)
        if isinstance(command, Analyse):
            return _staged(command, main_job.AnalyseConfig, main_job.stages, console)
        if isinstance(command, Spectrum):
            return _staged(command, spectrum.SpectrumConfig, spectrum.stages, console)
        if isinstance(command, Experiment):
            return _experiment(command, console)
        return _list(console) if isinstance(command, List) else _doctor(console)
    except BAD as error:
        errors.print(f"jaxnet: {' '.join(str(error).split())}", markup=False)
        return BAD_INPUT
    except KeyboardInterrupt:
        errors.print("jaxnet: interrupted; what was finished is kept")
        return INTERRUPTED


def _parse(arguments: Sequence[str]) -> Analyse | Spectrum | Experiment | List | Doctor:
    """The command; tyro's boxed complaint is brought to one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(Command, prog="jaxnet", args=list(arguments), description=DESCRIPTION)
    except SystemExit as end:
        if not end.code:
            raise
        words = "".join(c for c in printed.getvalue() if c not in "╭╮╰╯│─")
        raise ValueError(" ".join(words.split())) from None


def _check_out(output: Output) -> None:
    if output.out.exists() and not output.out.is_dir():
        raise ValueError(f"--out {output.out}: is a file; name a folder")
    if output.out.is_dir() and any(output.out.iterdir()) and not output.overwrite:
        raise ValueError(f"--out {output.out}: is not empty; name another folder, or pass --overwrite")
    # Better now than after the work: can a folder be made where it is wanted?
    parent = next(folder for folder in (output.out.absolute(), *output.out.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError:
        raise ValueError(f"--out {output.out}: cannot write into {parent}; name another folder") from None


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda words, share: None
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda words, share: bar.update(task, description=words, completed=share)


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
    _check_out(command)
    config = make_config(**{field.name: getattr(command, field.name) for field in dataclasses.fields(make_config)})
    record = None
    try:
        with jax.enable_x64(config.dtype == "float64"), _progress() as progress:
            for stage in stages(config, progress):
                record = stage
    finally:
        if record is not None:
            _finish(record, command.out, console)
    return DONE


def _experiment(command: Experiment, console: Console) -> int:
    chosen = experiments.names() if command.name == "all" else [command.name]
    known("experiment", command.name, [*experiments.names(), "all"])
    _check_out(command)
    passed = True
    with _progress() as progress:
        for number, name in enumerate(chosen):
            progress(name, number / len(chosen))
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
    "data": ("mnist1d", "mlxtend"),
    "stochastic": ("matfree",),
}


def _doctor(console: Console) -> int:
    for name, version in versions().items():
        console.print(f"{name:10} {version}", highlight=False)
    console.print(f"devices    {', '.join(str(device) for device in jax.devices())}", highlight=False)
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        state = f"lacks {', '.join(missing)}: pip install 'jaxnet\\[{extra}]'" if missing else "installed"
        console.print(f"extra {extra:10} {state}", highlight=False)
    return DONE
