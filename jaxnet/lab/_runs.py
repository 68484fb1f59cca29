"""The runs of the main job: training at a derived rate, λ_max along it, and a sweep beside it."""

import dataclasses
from typing import Any

import numpy as np

from jaxnet import curvature, losses, training
from jaxnet.contract import Array, MakeOptimizer
from jaxnet.lab import record
from jaxnet.lab._progress import Share
from jaxnet.lab._task import Task
from jaxnet.lab.record import Line, Panel, Record, Series

# Optimizers without second moments, whose limit is a multiple of 1/λ_max from the first step on.
PLAIN = ("sgd", "momentum", "nesterov")
# Rates of the sweep that a run is held against, in units of its own.
OCTAVES = 2.0 ** np.arange(-4, 4)


@dataclasses.dataclass(frozen=True)
class Run:
    """One of the three runs, with λ_max along it; entries from epoch 0 on."""

    name: str
    batch_size: int | None
    rate: float
    epoch: np.ndarray
    loss: np.ndarray
    test_loss: np.ndarray
    accuracy: float
    sharpness: np.ndarray
    num_matvecs: np.ndarray
    stopped: str
    diverged: bool
    sweep_rates: np.ndarray
    sweep_losses: np.ndarray
    lowest_loss: float


def train(
    task: Task,
    name: str,
    make_optimizer: MakeOptimizer,
    batch_size: int | None,
    *,
    derived: float,
    rate: float,
    num_epochs: int,
    key: Array,
    share: Share,
) -> Run:
    """A run at a rate, with λ_max along it, and the sweep that it is held against: the derived rate's neighbours."""
    followed = curvature.track(task.loss, task.sample, key=key).observer(task.params)

    given = (task.loss, task.params, task.train, make_optimizer)
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "num_epochs": num_epochs,
        "key": key,
        "validation": task.test,
        "metrics": {"loss": task.loss},
    }
    result = training.fit(
        *given,
        learning_rate=rate,
        **how,
        observers=[followed, lambda progress: share(progress.epoch / progress.num_epochs)],
    )
    rates = derived * OCTAVES
    swept = training.sweep(*given, learning_rates=rates, **how)
    first = lambda batch: float(task.loss(task.params, batch)) if batch is not None else np.nan
    history = result.history
    held_out = history.validation.get("loss", np.full(len(history.epoch), np.nan))
    accuracy = np.nan
    if task.labelled and task.apply is not None and task.test is not None:
        labels = (task.test[0], task.test[1])
        accuracy = float(losses.accuracy(task.apply, result.state.params, labels))
    return Run(
        name=name,
        batch_size=batch_size,
        rate=rate,
        epoch=np.append(0, history.epoch),
        loss=np.append(first(task.train), history.metrics["loss"]),
        test_loss=np.append(first(task.test), held_out),
        accuracy=accuracy,
        sharpness=np.array([float(check.value) for check in followed.checks]),
        num_matvecs=np.array([int(check.num_matvecs) for check in followed.checks]),
        stopped=str(result.stopped),
        diverged=result.stopped.reason == "diverged" or not np.isfinite(history.metrics["loss"][-1]),
        sweep_rates=rates,
        sweep_losses=np.array([_lowest(run.history) for run in swept]),
        lowest_loss=_lowest(history),
    )


def _lowest(history: training.History) -> float:
    """After any epoch, on held-out data where there are any; inf where none is finite."""
    losses_along = history.validation.get("loss", history.metrics["loss"])
    finite = losses_along[np.isfinite(losses_along)]
    return float(finite.min()) if finite.size else np.inf


def with_run(found: Record, run: Run, sampled: int, limit: float) -> Record:
    """The record with one run more.

    Args:
      found: the record, as JSON has it.
      run: the run.
      sampled: examples that λ_max is of.
      limit: c, where a rate of c/λ_max is the limit.
    """
    end = f", test accuracy {run.accuracy:.3f}" if np.isfinite(run.accuracy) else ""
    best = int(run.sweep_losses.argmin())
    rows = [
        (f"η, {run.name}", run.rate, f"loss {run.loss[0]:.3g} to {run.loss[-1]:.3g}{end}; {run.stopped}"),
        (
            f"best of a sweep, {run.name}",
            float(run.sweep_rates[best]),
            f"{len(run.sweep_rates)} octaves: lowest loss {run.sweep_losses[best]:.3g}, at η {run.lowest_loss:.3g}",
        ),
    ]
    claim = record.below(
        record.slug("near_the_best", run.name.partition(",")[0]),
        f"{run.name}: lowest loss at its rate, against twice the least of the sweep",
        2 * run.sweep_losses[best],
        run.lowest_loss,
    )
    before = found.measurements["runs"]
    arrays: Any = lambda values: {name: np.array(x) if isinstance(x, list) else x for name, x in values.items()}
    runs = [*(Run(**arrays(values)) for values in before), run]
    optimizer = found.config["optimizer"]
    panels = [_loss_panel(runs), _sweep_panel(runs, optimizer)]
    if optimizer in PLAIN:
        sampling = "the full batch" if sampled == found.measurements["num_examples"] else f"{sampled} examples"
        panels.append(_sharpness_panel(runs, limit, found.measurements["optimizer"], sampling))
    drawn = {panel.name for panel in panels}
    told = [_held_against_sweep(run)] if run.batch_size == found.config["batch_size"] else []
    return dataclasses.replace(
        found,
        measurements={**found.measurements, "runs": [*before, dataclasses.asdict(run)]},
        rows=[*found.rows, *rows],
        claims=[*found.claims, claim],
        panels=[*(panel for panel in found.panels if panel.name not in drawn), *panels],
        answer=[*found.answer, *told],
    )


def _held_against_sweep(run: Run) -> str:
    best = int(run.sweep_losses.argmin())
    verdict = "as good within a factor of two" if run.lowest_loss < 2 * run.sweep_losses[best] else "a miss"
    return (
        f"A sweep of {len(run.sweep_rates)} octaves found {run.sweep_rates[best]:.3g} best, with a lowest loss of "
        f"{run.sweep_losses[best]:.3g} where the derived rate has {run.lowest_loss:.3g}: {verdict}."
    )


def _sweep_panel(runs: list[Run], optimizer: str) -> Panel:
    return Panel(
        name="loss_against_learning_rate",
        title=f"{optimizer}: the derived rates, and what a sweep finds",
        xlabel="learning rate η",
        ylabel="lowest loss along the run, held-out if there is such data",
        series=[
            Series(
                run.name,
                run.sweep_rates,
                np.where(np.isfinite(run.sweep_losses), run.sweep_losses, np.nan),
                "line-points",
                colour,
            )
            for colour, run in enumerate(runs)
        ],
        lines=[Line(f"η, {run.name}", run.rate, "x", colour) for colour, run in enumerate(runs)],
        xscale="log",
        yscale="log",
    )


def _loss_panel(runs: list[Run]) -> Panel:
    series = []
    for colour, run in enumerate(runs):
        series.append(Series(f"{run.name}, η = {run.rate:.3g}", run.epoch, run.loss, "line", colour))
        if np.isfinite(run.test_loss).any():
            series.append(Series("  the same on test data", run.epoch, run.test_loss, "dashed", colour))
    return Panel(
        name="loss_against_epoch",
        title="Three updates, each at its rate, on equal numbers of example gradients",
        xlabel="epoch (each example's gradient once)",
        ylabel="mean loss",
        series=series,
        yscale="log",
    )


def _sharpness_panel(runs: list[Run], limit: float, optimizer: str, sampling: str) -> Panel:
    # Where the limit is c/λ_max, c/η is the sharpness that a rate η still bears.
    bearable = lambda rate: limit / rate
    name = "2/η" if optimizer == "sgd" else "limit for η"
    series = [Series(f"λ_max, {run.name}", run.epoch, run.sharpness, "line-points", c) for c, run in enumerate(runs)]
    lines = [Line(f"{name} of {run.name}", bearable(run.rate), "y", c) for c, run in enumerate(runs)]
    return Panel(
        name="sharpness_along_training",
        title="Sharpness along training, and the sharpness that each rate bears",
        xlabel="epoch",
        ylabel=f"λ_max of the Hessian on {sampling}",
        series=series,
        lines=lines,
        yscale="log",
    )
