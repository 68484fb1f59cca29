"""What to draw of each result of the library: one small function a result, each a list of panels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxnet.curvature import Eigenpairs, Landscape, Sharpness, SpectralDensity, Track, TrackObserver
from jaxnet.lab._landscapes import of_densities, of_density, of_landscape
from jaxnet.lab.record import Line, Panel, Record, Series, slug
from jaxnet.learning_rate import (
    Analysis,
    CriticalSharpness,
    MeasuredSgdStability,
    MeasuredStability,
    RangeTest,
    Stability,
)
from jaxnet.per_example import NoiseScale
from jaxnet.training import FitResult

# Told apart by colour and style; further runs of a sweep have no entry in the legend.
_STYLES_OF_RUNS = ("line", "dashed", "line-points")
_COLOURS = 7


def of(result: Any) -> Sequence[Panel]:
    """The panels of any result that the library draws.

    Raises:
      TypeError: it draws no such thing.
      ValueError: there is nothing in it to draw, or it has more than one leading axis.
    """
    for kind, draws in _DRAWN.items():
        if isinstance(result, kind):
            return draws(result)
    if isinstance(result, (list, tuple)) and result:
        for kind, draws in _DRAWN_IN_LISTS.items():
            if all(isinstance(entry, kind) for entry in result):
                return draws(result)
    one, several = (", ".join(kind.__name__ for kind in kinds) for kinds in (_DRAWN, _DRAWN_IN_LISTS))
    raise TypeError(f"plot: expected one of {one}, or a list of one of {several}; got {_named(result)}")


def _named(result: Any) -> str:
    if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
        kinds = sorted({type(entry).__name__ for entry in result})
        return f"a {type(result).__name__} of {', '.join(kinds) or 'nothing'}"
    return type(result).__name__


def of_analysis(found: Analysis) -> list[Panel]:
    """The limit and the rate to train at, against the batch size."""
    sizes = found.batch_sizes
    along = lambda value: [float(value(size)) for size in sizes]
    series = [
        Series("limit of stability here", sizes, along(found.limit), "line", 1),
        Series("the upper end of its bracket", sizes, along(lambda b: found.bracket(b)[1]), "dashed", 1),
        Series("rate to train at", sizes, along(found.rate), "line-points", 0),
        Series("best single step here", sizes, list(map(float, found.derived.greedy)), "dashed", 2),
    ]
    critical = float(found.critical_batch_size)
    lines = [Line("critical batch size", critical)] if np.isfinite(critical) else []
    if found.optimizer == "sgd":
        lines += [Line("1/λ_max", float(found.optimal), "y"), Line("2/λ_max", float(found.maximal), "y")]
    return [
        Panel(
            name="rate_against_batch_size",
            title=f"What noise leaves of the learning rate of {found.optimizer}, for each batch size",
            xlabel=f"batch size B, up to all {found.num_examples} examples",
            ylabel="learning rate η",
            series=series,
            lines=lines,
            xscale="log2",
            yscale="log",
        )
    ]


def of_range_test(found: RangeTest) -> list[Panel]:
    """The curve up to its divergence, each suggestion a line."""
    kept = slice(max(int(found.diverged), 1))
    rates, theory = np.asarray(found.rates)[kept], list(found.suggestions)[3:]
    colours = {name: 1 + number for number, name in enumerate(found.suggestions) if name not in theory}
    batch = "full batch" if found.batch_size is None else f"B = {found.batch_size}"
    return [
        Panel(
            name="range_test",
            title=f"Range test, {batch}: rates read off the curve (coloured), and derived (grey)",
            xlabel="learning rate η, rising from step to step",
            ylabel="loss after the step",
            series=[
                Series("loss", rates, np.asarray(found.loss)[kept], "points", 4),
                Series("smoothed", rates, np.asarray(found.smoothed)[kept], "line", 0),
            ],
            lines=[Line(name, float(value), "x", colours.get(name)) for name, value in found.suggestions.items()],
            xscale="log",
        )
    ]


def of_measured(found: MeasuredStability, predicted: float | None = None) -> list[Panel]:
    """The loss of plain training and the growth about the fixed point at each rate, beside 2/λ_max where known."""
    rates = np.asarray(found.rates)
    lines = [] if predicted is None else [Line("1/λ_max", predicted / 2), Line("2/λ_max", predicted)]
    final = np.asarray(found.plain_loss)[:, -1]
    # A run that overflowed has no final loss to draw; it failed, and its point stands at the top.
    start = float(found.plain_loss[0, 0])
    shown = np.where(np.isfinite(final), np.minimum(final, 100 * start), 100 * start)
    steps = found.plain_loss.shape[1] - 1
    measured = Line("measured loss of stability", float(found.limit))
    growth = np.asarray(found.growth).mean(axis=0)
    middle = float(found.limit) if predicted is None else predicted
    near = (rates > 0.5 * middle) & (rates < 1.6 * middle) if np.isfinite(middle) else np.full(rates.shape, True)
    series = [Series("measured, from gradients", rates[near], growth[near], "points")]
    if predicted is not None:
        series.append(Series("predicted, ηλ_max − 1", rates[near], 2 * rates[near] / predicted - 1, "line"))
    return [
        Panel(
            name="loss_against_rate",
            title=f"Full-batch training after {steps} steps, at each rate of the ladder",
            xlabel="learning rate η",
            ylabel="loss (clipped at 100 × the initial one)",
            series=[Series(f"loss after {steps} steps", rates, shown, "line-points")],
            lines=[*lines, measured, Line("initial loss", start, "y")],
            xscale="log",
            yscale="log" if (shown > 0).all() else "linear",
        ),
        Panel(
            name="stability_against_rate",
            title="Growth of the oscillation about the fixed point ω₀, on the tilted loss",
            xlabel="learning rate η",
            ylabel="factor a step",
            series=series,
            lines=[*(lines[1:] or [measured]), Line("neither grows nor dies", 1.0, "y")],
        ),
    ]


def of_measured_sgd(found: MeasuredSgdStability) -> list[Panel]:
    """The growth of SGD's distance at each rate that the bisections tried."""
    rates, growth = np.ravel(found.rates), np.ravel(found.growth)
    order = np.argsort(rates)
    limit, error = float(found.limit), float(found.limit_error)
    return [
        Panel(
            name="growth_against_rate",
            title=f"SGD's growth at the rates of {found.limits.size} bisections: it is unstable from {limit:.4g} on",
            xlabel="learning rate η",
            ylabel="factor a step of the squared distance |δ|²",
            series=[Series("measured, from gradients", rates[order], growth[order], "points")],
            lines=[
                Line(f"measured limit, ± {error:.1g}" if np.isfinite(error) else "measured limit", limit, "x", 1),
                Line("neither grows nor dies", 1.0, "y"),
            ],
            xscale="log",
            yscale="log",
        )
    ]


def of_stability(found: Stability) -> list[Panel]:
    """An optimizer's rate beside its limit; along time where they were stacked."""
    values = {"rate η": _along(found.rate), "limit of stability": _along(found.limit)}
    title = "The optimizer's rate, and the largest that is stable"
    if values["rate η"].size == 1:
        title += f": {float(values['rate η'][0] / values['limit of stability'][0]):.3g} of it"
    return [_along_time("stability", title, "learning rate η", values)]


def of_sharpness(found: Sharpness) -> list[Panel]:
    """λ_max and its upper bound; along time where they were stacked."""
    values = {"λ_max found": _along(found.value)}
    bound, error = _along(found.upper_bound), _along(found.sampling_error)
    if np.isfinite(bound).any():
        values["upper bound"] = bound
    lines = []
    if found.value.size == 1 and np.isfinite(error).all():
        lines = [Line(f"λ_max {sign} sampling error", float(values["λ_max found"][0] + s * error[0]), "y")
                 for sign, s in (("−", -1), ("+", 1))]  # fmt: skip
    return [_along_time("sharpness", "Largest eigenvalue of the Hessian", "λ_max", values, lines=lines)]


def of_track(found: Track | Sequence[Track]) -> list[Panel]:
    """λ_max along the updates: a point of one, a line of several, listed or stacked by a scan."""
    several = [found] if isinstance(found, Track) else found
    updates = np.concatenate([_along(one.num_updates) for one in several])
    values = np.concatenate([_along(one.sharpness.value) for one in several])
    return [_followed("update", updates, values)]


def of_track_observer(found: TrackObserver) -> list[Panel]:
    """λ_max at each epoch that was checked."""
    return [_followed("epoch", found.epochs, [float(check.value) for check in found.checks])]


def _followed(of_what: str, x: Any, y: Any) -> Panel:
    return Panel(
        name="sharpness_along_training",
        title="Largest eigenvalue of the Hessian along training",
        xlabel=of_what,
        ylabel="λ_max",
        series=[Series("", x, y, "line-points")],
    )


def of_critical(found: CriticalSharpness) -> list[Panel]:
    """λ_c, between the ends of its bracket; along time where they were stacked."""
    title, values = (
        "Critical sharpness 2/η_c, from the rate at which a step stops to lower the loss",
        _along(found.value),
    )
    lines = []
    if values.size == 1:
        low, high = np.ravel(2 / found.bracket)
        lines = [Line("2/η, the bracket's lower η", float(low), "y"), Line("its higher η", float(high), "y")]
    return [_along_time("critical_sharpness", title, "λ_c", {"λ_c": values}, lines=lines)]


def of_eigenpairs(found: Eigenpairs, title: str = "Eigenvalues found, in descending order") -> list[Panel]:
    """The eigenvalues one by one, and their residuals."""
    values, residuals = _along(found.values), _along(found.residual_norms)
    index = np.arange(1, values.size + 1)
    return [
        Panel(
            name="top_eigenvalues",
            title=title,
            xlabel="index",
            ylabel="eigenvalue",
            series=[Series("λ_i", index, values, "line-points")],
            lines=[Line("0", 0.0, "y")],
        ),
        Panel(
            name="residuals",
            title=f"Their residuals, {'converged' if found.converged else 'NOT converged'}",
            xlabel="index",
            ylabel="residual norm ‖Av − λv‖",
            series=[Series("", index, residuals, "points")],
            yscale="log" if (residuals > 0).all() else "linear",
        ),
    ]


def of_fit(found: FitResult) -> list[Panel]:
    """Losses against epoch and against step, and the metrics."""
    history, lines = found.history, []
    series = [Series("training, mean over the epoch's steps", history.epoch, history.loss, "line-points", 0)]
    if "loss" in history.validation:
        series.append(Series("validation, after the epoch", history.epoch, history.validation["loss"], "dashed", 1))
    if found.best is not None and np.isfinite(found.best.loss):
        lines = [Line("lowest validation loss", found.best.epoch, "x", 1)]
    per_epoch = history.step_loss.shape[1]
    steps = np.asarray(history.step)[:, None] + np.arange(1 - per_epoch, 1)
    each = Series("", np.ravel(steps), np.ravel(history.step_loss), "line" if steps.size > 1 else "points", 4)
    panels = [
        _losses("loss_against_epoch", f"Training {found.stopped}", "epoch", series, lines),
        _losses("loss_against_step", f"Loss before each of {steps.size} steps", "step", [each]),
    ]
    names = {**history.metrics, **{name: None for name in history.validation if name != "loss"}}
    for name in names:
        parts = (("training", history.metrics, "line-points"), ("validation", history.validation, "dashed"))
        series = [
            Series(f"{words}, after the epoch", history.epoch, values[name], style, colour)
            for colour, (words, values, style) in enumerate(parts)
            if name in values and not (name == "loss" and words == "validation")
        ]
        panels.append(Panel(slug("metric", name), f"Metric: {name}", "epoch", name, series))
    return panels


def of_sweep(found: Sequence[FitResult]) -> list[Panel]:
    """One line a run, and the runs' final losses."""
    losses = {"training": [run.history.loss for run in found]}
    if all("loss" in run.history.validation for run in found):
        losses["validation"] = [run.history.validation["loss"] for run in found]
    panels = []
    for words, of_runs in losses.items():
        series = []
        for number, (run, values) in enumerate(zip(found, of_runs, strict=True)):
            row = number // _COLOURS
            label = f"run {number}" + (", diverged" if run.stopped.reason == "diverged" else "")
            style = _STYLES_OF_RUNS[row % len(_STYLES_OF_RUNS)]
            # One epoch makes no line.
            style = "points" if len(values) == 1 else style
            series.append(Series(label if row < len(_STYLES_OF_RUNS) else "", run.history.epoch, values, style, number))
        panels.append(_losses(f"{words}_loss_against_epoch", f"{words.capitalize()} loss of each run", "epoch", series))
    final = [
        Series(words, np.arange(len(found)), [float(values[-1]) for values in of_runs], style)
        for (words, of_runs), style in zip(losses.items(), ("line-points", "dashed"), strict=False)
    ]
    diverged = sum(run.stopped.reason == "diverged" for run in found)
    title = f"Loss at the end of each run{f'; {diverged} diverged' if diverged else ''}"
    return [*panels, _losses("final_loss_against_run", title, "run", final)]


def of_noise_scale(found: NoiseScale) -> list[Panel]:
    """The noise that is left of a mini-batch's gradient, against its size."""
    trace, scale = float(found.trace), float(found.value) if found.resolved else float("nan")
    last = 4 * (scale if np.isfinite(scale) else 256)
    sizes = 2.0 ** np.arange(np.ceil(np.log2(max(last, 2))) + 1)
    squared = float(found.gradient_squared)
    signal = [Line("|G|², the gradient", squared, "y", 1)] if squared > 0 else []
    words = f"; equal at B = {scale:.3g}" if np.isfinite(scale) else "; |G|² is not resolved"
    return [
        Panel(
            name="noise_against_batch_size",
            title=f"Noise of a mini-batch's gradient, beside the gradient{words}",
            xlabel="batch size B",
            ylabel="squared length",
            series=[Series("S/B, the noise", sizes, trace / sizes, "line", 0)],
            lines=[*signal, Line("B_simple = S/|G|²", scale)],
            xscale="log2",
            yscale="log" if trace > 0 else "linear",
        )
    ]


def of_record(found: Record) -> Sequence[Panel]:
    """The panels that it declares."""
    if not found.panels:
        raise ValueError(f"plot: the record {found.name!r} declares no panels")
    return found.panels


def _along(values: Any) -> np.ndarray:
    """A number as one entry, a stack of numbers as it is."""
    array = np.atleast_1d(np.asarray(values))
    if array.ndim > 1:
        raise ValueError(f"plot: expected one result, or several along one leading axis, got axes {array.shape}")
    return array


def _along_time(
    name: str, title: str, ylabel: str, values: dict[str, np.ndarray], *, lines: Sequence[Line] = ()
) -> Panel:
    """A bar a name for single values, else a line a name."""
    if all(y.size == 1 for y in values.values()):
        bars = [Series("", [label], y, "bars", number) for number, (label, y) in enumerate(values.items())]
        return Panel(name, title, "", ylabel, bars, lines)
    series = [Series(label, np.arange(y.size), y, "line-points") for label, y in values.items()]
    return Panel(name, title, "index along the leading axis", ylabel, series, lines)


def _losses(name: str, title: str, xlabel: str, series: Sequence[Series], lines: Sequence[Line] = ()) -> Panel:
    """On a log axis, unless a loss is zero or below."""
    values = np.concatenate([np.ravel(one.y) for one in series])
    finite = values[np.isfinite(values)]
    yscale = "log" if finite.size and (finite > 0).all() else "linear"
    return Panel(name, title, xlabel, "loss", series, lines, yscale=yscale)


_DRAWN: dict[type, Callable[[Any], Sequence[Panel]]] = {
    Analysis: of_analysis,
    RangeTest: of_range_test,
    MeasuredStability: of_measured,
    MeasuredSgdStability: of_measured_sgd,
    Stability: of_stability,
    CriticalSharpness: of_critical,
    Sharpness: of_sharpness,
    Eigenpairs: of_eigenpairs,
    SpectralDensity: of_density,
    Landscape: of_landscape,
    Track: of_track,
    TrackObserver: of_track_observer,
    FitResult: of_fit,
    NoiseScale: of_noise_scale,
    Record: of_record,
}
_DRAWN_IN_LISTS: dict[type, Callable[[Any], Sequence[Panel]]] = {
    Track: of_track,
    SpectralDensity: of_densities,
    FitResult: of_sweep,
}
