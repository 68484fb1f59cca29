"""Declared panels to figures. Nothing is computed here."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxnet.lab import _panels
from jaxnet.lab.record import Panel, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_SIZE = (7.2, 4.5)  # inches

# Okabe & Ito's palette, told apart by readers with any colour vision; the yellow is left out.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES: dict[str, dict[str, Any]] = {
    "line": {"linestyle": "-"},
    "dashed": {"linestyle": "--"},
    "points": {"linestyle": "none", "marker": "o", "markersize": 4},
    "line-points": {"linestyle": "-", "marker": "o", "markersize": 3.5},
}


def plot(result: Any) -> "Figure":
    """Any result of the library as one matplotlib figure.

    Args:
      result: an `Analysis`, a `RangeTest`, a measured limit, a `Stability`, a `CriticalSharpness`; a `Sharpness`,
        `Eigenpairs`, a `Landscape`, a `SpectralDensity` or a `Track` (one, several stacked, or a list of them), a
        `TrackObserver`; a `FitResult`, or a list of them as `sweep` returns; a `NoiseScale`; or a
        `jaxnet.lab.record.Record`.

    Returns:
      A figure of one panel or several, to be saved with ``figure.savefig(path)``, and shown by a notebook; no window
      and no global state is touched.

    Raises:
      TypeError: it is none of these.
      ValueError: it holds nothing to draw, or has more leading axes than one.
      ImportError: matplotlib is not installed (extra ``app``).
    """
    panels = _panels.of(result)
    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 6 else 3
    rows = math.ceil(len(panels) / columns)
    figure = _figure(columns, rows)
    for number, panel in enumerate(panels, start=1):
        _draw_panel(panel, figure.add_subplot(rows, columns, number))
    return figure


def draw(record: Record | Sequence[Panel]) -> dict[str, "Figure"]:
    """One matplotlib figure a panel.

    Args:
      record: a `jaxnet.lab.record.Record`, or panels.

    Returns:
      Panel name -> figure, to be saved with ``figure.savefig(path)``; no window and no global state is touched.

    Raises:
      ImportError: matplotlib is not installed (extra ``app``).
    """
    panels = record.panels if isinstance(record, Record) else record
    figures = {}
    for panel in panels:
        figures[panel.name] = _figure(1, 1)
        _draw_panel(panel, figures[panel.name].add_subplot())
    return figures


def _figure(columns: int, rows: int) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'jaxnet[app]'") from error
    width, height = PANEL_SIZE
    return Figure(figsize=(width * columns, height * rows), dpi=150, layout="constrained")


def _draw_panel(panel: Panel, axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if panel.contours is not None:
        c = panel.contours
        drawn = axes.contour(c.x, c.y, c.z, levels=_levels(np.asarray(c.z)), colors="0.7", linewidths=0.8)
        axes.clabel(drawn, fontsize=7, fmt="%.3g")
        axes.plot([], [], color="0.7", linewidth=0.8, label=c.label)
    drawn_before: list[tuple[np.ndarray, np.ndarray]] = []
    for number, series in enumerate(panel.series):
        colour = PALETTE[(number if series.colour is None else series.colour) % len(PALETTE)]
        x, y = np.asarray(series.x), np.asarray(series.y)
        if not np.isfinite(y).any():
            continue
        if series.style == "bars":
            names = len(x) < 2 or x.dtype.kind == "U"
            axes.bar(x, y, width=0.8 if names else 0.8 * np.min(np.diff(x)), color=colour, label=series.label)
        else:
            style = dict(STYLES[series.style])
            if below := sum(_coincide(panel, (x, y), other) for other in drawn_before):
                style["linestyle"] = _beside(below)
            axes.plot(x, np.where(np.isfinite(y), y, np.nan), color=colour, label=series.label, **style)
            if style["linestyle"] != "none":
                drawn_before.append((x, y))
    lines = [line for line in panel.lines if np.isfinite(line.value)]
    for number, line in enumerate(lines):
        below = sum(
            other.axis == line.axis and bool(np.isclose(other.value, line.value, 0.01)) for other in lines[:number]
        )
        # Of two greys on one another the dashes would look like those of a third.
        own = below if line.colour is None and below else line.colour
        colour = "0.35" if own is None else PALETTE[own % len(PALETTE)]
        dash = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))[number % 4] if line.colour is None else "--"
        (axes.axvline if line.axis == "x" else axes.axhline)(
            line.value, color=colour, linestyle=_beside(below) if below else dash, linewidth=1.1, label=line.label
        )
    # To set a scale, even the linear one that stands, would take the names off an axis of bars.
    scales = {f"{axis}scale": s for axis, s in (("x", panel.xscale), ("y", panel.yscale)) if s != "linear"}
    if scales.get("xscale") == "log2":
        del scales["xscale"]
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, **scales)
    for axis, scale, values in (
        (axes.xaxis, panel.xscale, axes.get_xlim()),
        (axes.yaxis, panel.yscale, axes.get_ylim()),
    ):
        # Within two decades the powers of ten alone leave a log axis almost bare.
        if scale == "log" and values[1] < 100 * values[0]:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    # There is no half epoch.
    whole = [np.asarray(series.x).dtype.kind in "iu" for series in panel.series]
    if panel.xscale == "linear" and whole and all(whole):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(textwrap.fill(panel.title, 80), fontsize=10.5, loc="left")
    axes.grid(visible=True, which="major", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if labels := axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", ncols=1 + len(labels) // 8)


def _coincide(panel: Panel, one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether two curves lie on one another, to a hundredth of what both span, in half of the first one's points."""
    if one[0].shape != other[0].shape or not np.array_equal(one[0], other[0]):
        return False
    both = np.array([one[1], other[1]], float)
    both[~np.isfinite(both)] = np.nan
    if panel.yscale == "log":
        both = np.log(both, where=both > 0, out=np.full_like(both, np.nan))
    shown = np.isfinite(both)
    if not shown.any(axis=1).all():
        return False
    near = np.abs(both[0] - both[1]) <= 0.01 * (np.nanmax(both) - np.nanmin(both))
    return bool(2 * near.sum() >= shown[0].sum())


def _beside(below: int) -> tuple[int, tuple[int, int]]:
    """Dashes in the gaps of which what lies below is seen; of a third curve they begin elsewhere."""
    return 4 * (below - 1), (4, 4)


def _levels(z: np.ndarray) -> np.ndarray:
    """Eight levels, closer together near the minimum."""
    low, high = np.nanmin(z), np.nanmax(z)
    return low + (high - low) * np.linspace(0.08, 0.98, 8) ** 2
