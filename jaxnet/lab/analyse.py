"""The main job: what should the learning rate be, and does training agree?"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import curvature, learning_rate, losses, training
from jaxnet.contract import Array, UserError, check_batch_size
from jaxnet.lab import _panels, record
from jaxnet.lab._task import OnStage, Task, TaskConfig, check_count, keys_of, known, make_task, rate_of
from jaxnet.lab.record import Claim, Line, Panel, Record, Series
from jaxnet.learning_rate import Analysis, MeasuredStability

MOMENTUM = 0.9
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=MOMENTUM),
    "nesterov": functools.partial(optax.sgd, momentum=MOMENTUM, nesterov=True),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadam": optax.nadam,
    "amsgrad": optax.amsgrad,
    "rmsprop": optax.rmsprop,
}
# Targets of this size are out of reach for a few epochs.
LARGE_TARGETS = 100.0
# Rates of the sweep that a run is held against, in units of its own.
OCTAVES = 2.0 ** np.arange(-4, 4)
# Rates of the ladder, in units of the predicted limit: from .35 to 8, closer together around 1.
STEPS_OF_LADDER = 2.0 ** np.unique(np.concatenate([np.arange(-1.5, 3.01, 0.25), np.arange(-0.5, 0.51, 0.125)]))


@dataclasses.dataclass(frozen=True)
class AnalyseConfig(TaskConfig):
    """Derive the learning rate of a task from its curvature and noise, and hold it against training."""

    batch_size: int = 32
    """B of the mini-batch run."""
    optimizer: str = "sgd"
    """What trains: sgd, momentum or nesterov (β = 0.9), adam, adamw, nadam, amsgrad or rmsprop."""
    learning_rate: float | None = None
    """A rate of your own for the full-batch run, in place of the derived one."""
    num_epochs: int = 30
    """Epochs of each of the three runs: equal numbers of example gradients."""


def stages(config: AnalyseConfig, on_stage: OnStage = lambda stage, share: None) -> Iterator[Record]:
    """The job's record, growing: one yield after each stage, so that an interrupted job keeps what it has.

    Raises:
      UserError: before the first yield, if the configuration does not hold together.
    """
    known("optimizer", config.optimizer, OPTIMIZERS)
    keys = keys_of(config, 5)
    on_stage("loading data", 0.0)
    task = make_task(config, key=keys[0])
    num_examples = len(task.train[1])
    check_batch_size(config.batch_size, num_examples)
    check_count("num_epochs", config.num_epochs)
    own = config.learning_rate
    limits = np.finfo(config.dtype)
    if own is not None and not float(limits.tiny) <= own <= float(limits.max):
        raise UserError(f"learning_rate: expected positive and finite in {config.dtype}, got {own}")
    on_stage("λ_max and the gradient's noise", 0.05)
    analysis = learning_rate.analyse(
        task.loss,
        task.params,
        task.train,
        key=keys[1],
        make_optimizer=OPTIMIZERS[config.optimizer],
        batch_sizes=sorted({1, config.batch_size, num_examples}),
    )
    found = Record(
        name="analyse",
        question=f"What should the learning rate be? {task.title}, {task.num_params} parameters, N = {num_examples}",
        config=dataclasses.asdict(config),
        seed=config.seed,
        dtype=str(jnp.result_type(*jax.tree.leaves(task.params))),
        measurements=analysis.to_dict(),
        rows=[*task.rows, *_of_targets(task), *analysis.rows(), *_of_own_rate(config, analysis)],
        panels=_panels.of_analysis(analysis),
    )
    yield found

    runs: list[Run] = []
    for number, (name, batch_size) in enumerate(
        [
            ("full batch", None),
            (f"mini-batch, B = {config.batch_size}", config.batch_size),
            ("stochastic, B = 1", 1),
        ]
    ):
        share = lambda done, number=number: on_stage(f"training, {name}", 0.15 + 0.2 * (number + done))
        runs.append(_train(config, task, analysis, name, batch_size, keys[2], share))
        with_runs = _with_runs(found, runs, analysis, len(task.sample[1]))
        yield with_runs
    found = with_runs

    on_stage("ladder of rates", 0.8)
    yield _with_ladder(found, task, analysis, keys[3:])
    on_stage("done", 1.0)


def _of_targets(task: Task) -> list[tuple[str, Any, str]]:
    """A warning where a network's outputs, which begin near 1, have far to go."""
    largest = float(jnp.abs(task.train[1]).max())
    if task.labelled or largest < LARGE_TARGETS:
        return []
    return [("largest target", largest, "far from outputs that begin near 1: pass --standardise-target, or rescale")]


def _of_own_rate(config: AnalyseConfig, analysis: Analysis) -> list[tuple[str, Any, str]]:
    rate = config.learning_rate
    if rate is None:
        return []
    return [("your η, full batch", rate, f"stable here? {analysis.is_stable(rate)}")]


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


def _train(
    config: AnalyseConfig,
    task: Task,
    analysis: Analysis,
    name: str,
    batch_size: int | None,
    key: Array,
    share: Callable[[float], None],
) -> Run:
    rate = rate_of(analysis, batch_size)
    if batch_size is None and config.learning_rate is not None:
        rate = config.learning_rate
    followed = curvature.track(task.loss, task.sample, key=key).observer(task.params)

    given = (task.loss, task.params, task.train, OPTIMIZERS[config.optimizer])
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "num_epochs": config.num_epochs,
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
    # The derived rate's neighbours, whatever this run was told to take.
    rates = rate_of(analysis, batch_size) * OCTAVES
    swept = training.sweep(*given, learning_rates=rates, **how)
    first = lambda batch: float(task.loss(task.params, batch)) if batch is not None else np.nan
    history = result.history
    held_out = history.validation.get("loss", np.full(len(history.epoch), np.nan))
    accuracy = np.nan
    if task.labelled and task.test is not None:
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


def _with_runs(found: Record, runs: list[Run], analysis: Analysis, sampled: int) -> Record:
    rows, claims = [*found.rows], []
    for run in runs:
        end = f", test accuracy {run.accuracy:.3f}" if np.isfinite(run.accuracy) else ""
        rows.append((f"η, {run.name}", run.rate, f"loss {run.loss[0]:.3g} to {run.loss[-1]:.3g}{end}; {run.stopped}"))
        best = int(run.sweep_losses.argmin())
        rows.append(
            (
                f"best of a sweep, {run.name}",
                run.sweep_rates[best],
                f"{len(run.sweep_rates)} octaves: lowest loss {run.sweep_losses[best]:.3g}, at η {run.lowest_loss:.3g}",
            )
        )
        claims.append(
            record.below(
                record.slug("near_the_best", run.name.partition(",")[0]),
                f"{run.name}: lowest loss at its rate, against twice the least of the sweep",
                2 * run.sweep_losses[best],
                run.lowest_loss,
            )
        )
    measurements = {**found.measurements, "runs": [dataclasses.asdict(run) for run in runs]}
    sampling = "the full batch" if sampled == found.measurements["num_examples"] else f"{sampled} examples"
    panels = [*found.panels, _loss_panel(runs), _sweep_panel(runs, found.config["optimizer"])]
    if found.config["optimizer"] in ("sgd", "momentum", "nesterov"):
        panels.append(_sharpness_panel(runs, analysis, sampling))
    return dataclasses.replace(found, measurements=measurements, rows=rows, claims=claims, panels=panels)


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


def _sharpness_panel(runs: list[Run], analysis: Analysis, sampling: str) -> Panel:
    # Without second moments the limit is c/λ_max: c/η is the sharpness that a rate η still bears.
    factor = float(analysis.limit(None) * analysis.sharpness.value)
    bearable = lambda rate: factor / rate
    name = "2/η" if analysis.optimizer == "sgd" else "limit for η"
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


def _with_ladder(found: Record, task: Task, analysis: Analysis, keys: Array) -> Record:
    batch, value = task.sample, analysis.sharpness.value
    n = len(batch[1])
    if n < len(task.train[1]):
        value = curvature.sharpness(task.loss, task.params, batch, key=keys[0], tol=1e-4).value
    make = OPTIMIZERS[found.config["optimizer"]]
    # An optimizer with second moments has no limit before they have seen gradients: gradient descent stands in for it.
    plain = found.config["optimizer"] not in ("sgd", "momentum", "nesterov")
    make = optax.sgd if plain else make
    predicted = float(
        learning_rate.maximal(value) if plain else analysis.limit(None) * analysis.sharpness.value / value
    )
    rates = predicted * STEPS_OF_LADDER
    ladder = learning_rate.measure_stability(task.loss, task.params, batch, make, rates=rates, key=keys[1])
    sampling = f"{'gradient descent' if make is optax.sgd else found.config['optimizer']} on {n} examples"
    if np.isnan(float(ladder.limit)) and found.dtype == "float32":
        # Kinks (relu) lie closer to ω₀ than single precision can start beside it.
        with jax.enable_x64(True):
            double = lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
            params, batch = jax.tree.map(double, (task.params, batch))
            ladder = learning_rate.measure_stability(task.loss, params, batch, make, rates=rates, key=keys[1])
        sampling += ", in float64"
    # In NumPy, which keeps the double precision that JAX has only inside of the block above.
    ladder = jax.tree.map(np.asarray, ladder)
    limit, error = float(ladder.limit), float(ladder.limit_error)
    high = float(ladder.plain_bracket[1])
    rows = [
        *found.rows,
        (
            "η where ω₀ loses stability",
            limit,
            f"± {error:.1g}, measured: {sampling}; predicted {predicted:.5g}",
        ),
        ("η where plain training fails", high, _of_plain_training(ladder)),
    ]
    claims = [_stability_claim(predicted, limit), *found.claims]
    measurements = {
        **found.measurements,
        "ladder": {
            **dataclasses.asdict(ladder),
            "predicted": predicted,
            "limit": limit,
            "limit_error": error,
        },
    }
    panels = [*found.panels, *_panels.of_measured(ladder, predicted)]
    return dataclasses.replace(found, measurements=measurements, rows=rows, claims=claims, panels=panels)


def _of_plain_training(ladder: MeasuredStability) -> str:
    low, high = (float(x) for x in ladder.plain_bracket)
    if np.isnan(high):
        return f"measured: no rate of the ladder fails, up to {low:.3g}"
    return f"measured: the first on the ladder; {low:.3g} still trains"


def _stability_claim(predicted: float, limit: float) -> Claim:
    return record.within("limit", "loss of stability at ω₀, predicted and measured", predicted, limit, 0.05)
