"""What to draw of each result of the library."""

import numpy as np

from jaxnet.lab.record import Line, Panel, Series
from jaxnet.learning_rate import Analysis, RangeTest


def of_analysis(found: Analysis) -> list[Panel]:
    """The limit and the rate to train at, against the batch size."""
    sizes = found.batch_sizes
    series = [
        Series("limit of stability, sharpest direction", sizes, [float(found.limit(b)) for b in sizes], "line", 1),
        Series("rate to train at", sizes, [float(found.rate(b)) for b in sizes], "line-points", 0),
    ]
    return [
        Panel(
            name="rate_against_batch_size",
            title="What noise leaves of the learning rate, for each batch size",
            xlabel=f"batch size B, up to all {found.num_examples} examples",
            ylabel="learning rate η",
            series=series,
            lines=[
                Line("1/λ_max", float(found.optimal), "y"),
                Line("2/λ_max", float(found.maximal), "y"),
                Line("critical batch size", float(found.critical_batch_size)),
            ],
            xscale="log",
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
