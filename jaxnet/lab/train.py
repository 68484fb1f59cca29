"""Training from words: at the rate that theory gives or at one's own, on disk as it goes, and resumable."""

import dataclasses
import importlib.util
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import learning_rate, losses, training
from jaxnet.contract import Array, check_batch_size
from jaxnet.lab import _panels, record
from jaxnet.lab._progress import OnStage, Share
from jaxnet.lab._resumed import as_read, check_same_job
from jaxnet.lab._task import Task, TaskConfig, check_count, check_own_rate, keys_of, known, make_task, rate_of
from jaxnet.lab.analyse import OPTIMIZERS, Optimizer, answer
from jaxnet.lab.record import Record

Schedule = Literal["linear", "constant"]
# From one checkpoint to the next; what ends in any way but by SIGKILL leaves its last epoch too.
MINUTES = 1.0


@dataclasses.dataclass(frozen=True)
class TrainConfig(TaskConfig):
    """Train a network at the learning rate that follows from curvature and noise."""

    batch_size: int = 32
    """B, the examples of a step; N, as many as there are to train on, is the full batch."""
    optimizer: Optimizer = "sgd"
    """What trains; momentum and nesterov with β = 0.9."""
    learning_rate: float | None = None
    """A rate of your own, in place of the derived one."""
    schedule: Schedule = "linear"
    """linear: the rate falls to 0 in a straight line, with a warm-up where it is above the limit of stability at first.
    constant: it stays."""
    num_epochs: int = 30
    """How often each example is seen."""


def stages(
    config: TrainConfig,
    on_stage: OnStage = lambda stage, share: None,
    begun: Record | None = None,
    *,
    folder: pathlib.Path,
) -> Iterator[Record]:
    """The job's record, growing: the rate and why, then the run.

    Beside the record, the folder gets ``history.jsonl``, a line an epoch, and checkpoints. A job that goes on from
    ``begun``, the record of one that was broken off, takes its rate from there, goes on at its newest checkpoint, and
    leaves the same record as one that was not. At a constant rate it may be told to run longer, too.

    Raises:
      UserError: before the first yield, if the configuration does not hold together, or ``begun`` is of another job.
    """
    known("optimizer", config.optimizer, OPTIMIZERS)
    known("schedule", config.schedule, get_args(Schedule))
    check_own_rate(config.learning_rate, config.dtype)
    check_count("num_epochs", config.num_epochs)
    keys = keys_of(config, 3)
    on_stage("loading data", 0.0)
    task = make_task(config, key=keys[0])
    check_batch_size(config.batch_size, task.num_examples)
    resumed, found = begun is not None, begun
    if begun is not None:
        longer = config.schedule == "constant" and config.num_epochs > begun.config.get("num_epochs", 0)
        check_same_job(begun, "train", config, task, free=("num_epochs",) if longer else ())
        # The record of the shorter run has what is not of this one; its rate is the same when it is derived again.
        found = None if longer else begun
    else:
        _forget_checkpoints(folder)
    if found is None:
        on_stage("λ_max and the gradient's noise", 0.03)
        found = _with_rate(config, task, keys[1])
    yield (found := as_read(found))
    if "run" not in found.measurements:
        on_stage("training", 0.3)
        share: Share = lambda done: on_stage("training", 0.3 + 0.7 * done)
        result = _fit(config, task, found, folder, keys[2], resumed, share)
        yield _with_run(config, task, found, result)
    on_stage("done", 1.0)


def _with_rate(config: TrainConfig, task: Task, key: Array) -> Record:
    n, size, own = task.num_examples, config.batch_size, config.learning_rate
    if own is None:
        analysis = learning_rate.analyse(
            task.loss, task.params, task.train, key=key, make_optimizer=OPTIMIZERS[config.optimizer], batch_sizes=[size]
        )
        rate, limit, why = rate_of(analysis, size), float(analysis.limit(size)), analysis.reason(size)
        words, rows, found = answer(config.optimizer, size, analysis), analysis.rows(), analysis.to_dict()
    else:
        rate, limit, why = own, np.nan, "your own"
        words, rows, found = [], [(f"η, {config.optimizer}, B = {size}", own, why)], {}
    return Record(
        name="train",
        question=f"Does it train? {task.title}, {task.num_params} parameters, N = {n}",
        config=dataclasses.asdict(config),
        seed=config.seed,
        dtype=str(jnp.result_type(*jax.tree.leaves(task.params))),
        measurements={**found, "rate": rate, "limit": limit, "why": why, "data": task.digest},
        rows=[*task.rows, *rows],
        answer=words,
    )


def _schedule(config: TrainConfig, found: Record, num_steps: int) -> Any:
    """The rate, as `jaxnet.training.fit` takes it."""
    rate, limit = float(found.measurements["rate"]), float(found.measurements["limit"])
    return rate if config.schedule == "constant" else learning_rate.linear_to_zero(rate, num_steps, limit=limit)


def _fit(
    config: TrainConfig,
    task: Task,
    found: Record,
    folder: pathlib.Path,
    key: Array,
    resumed: bool,
    share: Share,
) -> training.FitResult:
    make = OPTIMIZERS[config.optimizer]
    rate = _schedule(config, found, config.num_epochs * -(-task.num_examples // config.batch_size))
    start: Any = training.init_state(task.params, make(rate))
    observers: list[Any] = [training.JsonLines(folder / "history.jsonl"), lambda run: share(run.epoch / run.num_epochs)]
    if orbax_is_here():
        checkpoints = training.Checkpoints(folder / "checkpoints", minutes=MINUTES)
        start = checkpoints.resume(start) if resumed else start
        observers.append(checkpoints)
    return training.fit(
        task.loss,
        start,
        task.train,
        make,
        learning_rate=rate,
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        key=key,
        validation=task.test,
        metrics={"loss": task.loss},
        observers=observers,
    )


def _with_run(config: TrainConfig, task: Task, found: Record, result: training.FitResult) -> Record:
    history, params = result.history, result.state.params
    first, last = float(task.loss(task.params, task.train)), float(history.metrics["loss"][-1])
    run: dict[str, Any] = {"stopped": str(result.stopped), "num_steps": result.stopped.step, "loss": last}
    rows: list[tuple[str, Any, str]] = [("training loss", last, f"{first:.3g} at the start; {result.stopped}")]
    ends = [f"training loss {first:.3g} to {last:.3g}"]
    if task.test is not None and result.best is not None:
        lowest = {"epoch": result.best.epoch, "loss": result.best.loss}
        run["test_loss"], run["lowest_test_loss"] = float(history.validation["loss"][-1]), lowest
        rows.append(("test loss", run["test_loss"], f"lowest {lowest['loss']:.3g}, after epoch {lowest['epoch']}"))
        ends.append(f"test loss {run['test_loss']:.3g}")
        if task.labelled and task.apply is not None:
            run["accuracy"] = float(losses.accuracy(task.apply, params, task.test))
            rows.append(("test accuracy", run["accuracy"], f"of {len(task.test[1])} examples held out"))
            ends.append(f"test accuracy {run['accuracy']:.3f}")
    kept = "the params, and all that it takes to go on" if orbax_is_here() else "none: pip install 'jaxnet[checkpoint]'"
    rows.append(("checkpoints", "", kept))
    claim = record.below("loss_falls", "training loss at the end, against the start's", first, last)
    return dataclasses.replace(
        found,
        measurements={**found.measurements, "run": run, "history": dataclasses.asdict(history)},
        rows=[*rows, *found.rows],
        claims=[claim],
        panels=_panels.of_fit(result),
        answer=[*found.answer, f"Training {result.stopped}: {', '.join(ends)}."],
    )


def orbax_is_here() -> bool:
    """Whether there can be checkpoints."""
    return importlib.util.find_spec("orbax") is not None


def _forget_checkpoints(folder: pathlib.Path) -> None:
    """Remove those of a run that is overwritten: they are named by epochs."""
    kept = folder / "checkpoints"
    if jax.process_index() == 0 and kept.is_dir():
        for path in [path for path in kept.iterdir() if path.name.isdecimal()]:
            shutil.rmtree(path)
