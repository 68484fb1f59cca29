"""The best rate for whole runs against the batch size, derived and measured, with SGD and with Adam."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from jaxnet import data, learning_rate, training
from jaxnet.contract import Array, Loss
from jaxnet.lab._progress import Share, watched
from jaxnet.lab.record import Claim, Panel, Series

Maker = Callable[[Any], optax.GradientTransformation]
# The octaves that are tried, from the first of two exponents up to the second; and how far from a good rate the derived
# one may be. In ten seeds it was at most 2.3, 2.3 and, with Adam's smallest batches, 4.4 times away.
MAKERS: dict[str, tuple[Maker, tuple[int, int], float]] = {
    "SGD": (optax.sgd, (-6, 5), 3),
    "heavy ball": (functools.partial(optax.sgd, momentum=0.9), (-9, 2), 3),
    "Adam": (optax.adam, (-12, -1), 6),
}
# How near to the least held-out loss a rate is a good one.
GOOD = 1.1


def whole_runs(
    loss: Loss, params: Any, batch: Any, batch_sizes: tuple[int, ...], num_epochs: int, key: Array, share: Share
) -> dict[str, dict[str, np.ndarray]]:
    """For each optimizer and batch size the derived rate, the best of a sweep, and the ends of the good rates."""
    held_out, found = data.digits("test"), {}
    for name, (make, (first, last), _) in watched(MAKERS.items(), share):
        rates = 2.0 ** np.arange(first, last + 1)
        analysis = learning_rate.analyse(
            loss, params, batch, key=key, make_optimizer=make, batch_sizes=batch_sizes, second_moments=False
        )
        rows = []
        for size in batch_sizes:
            runs = training.sweep(
                loss, params, batch, make, learning_rates=rates, batch_size=size, num_epochs=num_epochs, key=key,
                validation=held_out,
            )  # fmt: skip
            losses = np.array([np.nanmin([*run.history.validation["loss"], np.inf]) for run in runs])
            good = rates[losses <= GOOD * losses.min()]
            derived, error = float(analysis.rate(size)), float(analysis.rate_error(size))
            rows.append((derived, error, rates[losses.argmin()], good[0], good[-1]))
        found[name] = dict(zip(("derived", "error", "best", "low", "high"), np.array(rows).T, strict=True))
    return found


def claims(batch_sizes: tuple[int, ...], found: dict[str, dict[str, np.ndarray]]) -> list[Claim]:
    """Each derived rate lies within a factor of the good rates."""
    made = []
    for name, of in found.items():
        distance = np.maximum(of["derived"] / of["high"], 1) / np.maximum(of["low"] / of["derived"], 1)
        worst = float(distance[np.argmax(np.abs(np.log(distance)))])
        words = f"{name}, whole runs: derived rate / good rates, worst of B = {batch_sizes[0]} … {batch_sizes[-1]}"
        key = f"whole_runs_{name.lower().replace(' ', '_')}"
        factor = MAKERS[name][-1]
        made.append(Claim(key, words, 1.0, worst, 1 / factor <= worst <= factor, f"within a factor of {factor:g}"))
    return made


def panel(batch_sizes: tuple[int, ...], found: dict[str, dict[str, np.ndarray]]) -> Panel:
    """Derived and measured rates in one figure."""
    series = []
    for colour, (name, of) in enumerate(found.items()):
        series += [
            Series(f"{name}: derived", batch_sizes, of["derived"], "line", colour),
            Series("" if colour else "  best of a sweep", batch_sizes, of["best"], "points", colour),
            Series("" if colour else "  within a tenth of its loss", batch_sizes, of["low"], "dashed", colour),
            Series("", batch_sizes, of["high"], "dashed", colour),
        ]
    return Panel(
        name="whole_runs",
        title="The best constant rate for whole runs on digits",
        xlabel="batch size B",
        ylabel="learning rate η",
        series=series,
        xscale="log2",
        yscale="log",
    )
