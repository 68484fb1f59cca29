"""What to draw of the loss's landscape: how its curvature is spread, and slices of it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.curvature import Landscape, SpectralDensity
from jaxnet.lab.record import Contours, Line, Panel, Series

# Densities in one figure, told apart by their colours.
_MOST = 7


def of_density(
    found: SpectralDensity, *, count: int | None = None, tops: Any = (), smallest: float | None = None
) -> list[Panel]:
    """The density of eigenvalues, smoothed, with the band of its error; of ``count`` of them, or as shares.

    Args:
      found: the density.
      count: n, how many eigenvalues there are.
      tops: the largest of them, known one by one.
      smallest: the smallest, known too.
    """
    if found.nodes.ndim == 3:
        return of_densities([jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(found.nodes))])
    _check_one(found)
    n, tops = 1 if count is None else count, np.asarray(tops)
    points, width = _range_of([found], *tops[:1].tolist())
    mean, error = (n * np.asarray(x) for x in found.density(jnp.asarray(points, found.nodes.dtype), width))
    single = 1 / (width * np.sqrt(2 * np.pi))
    # Below a hundredth of one eigenvalue's peak there is nothing to see on a log axis.
    least = single / 100 if count is not None else 1e-6 * mean.max()
    shown = lambda y: np.where(y > least, y, np.nan)
    known = Series("peak of each of the largest, one by one", tops, np.full(len(tops), single), "points", 1)
    return [
        Panel(
            name="spectral_density",
            title=f"Density of the {'' if count is None else f'{count} '}eigenvalues, smoothed by {width:.2g}",
            xlabel="eigenvalue",
            ylabel=f"{'share of ' if count is None else ''}eigenvalues per unit",
            series=[
                Series(f"mean of {len(found.nodes)} random probes", points, shown(mean), "line", 0),
                Series("95 % band of that mean", points, shown(mean + 1.96 * error), "dashed", 0),
                Series("", points, shown(mean - 1.96 * error), "dashed", 0),
                *([known] if tops.size else []),
            ],
            lines=[] if smallest is None else [Line("λ_min", smallest)],
            yscale="log",
        )
    ]


def of_densities(several: Sequence[SpectralDensity], labels: Sequence[str] = ()) -> list[Panel]:
    """The densities at several points of a run, on one axis, each as shares; of many, some that lie evenly apart."""
    for one in several:
        _check_one(one)
    shown = np.unique(np.linspace(0, len(several) - 1, min(len(several), _MOST)).round().astype(int))
    points, width = _range_of(several)
    curves = [np.asarray(several[i].density(jnp.asarray(points, several[i].nodes.dtype), width)[0]) for i in shown]
    least = 1e-6 * max(float(curve.max()) for curve in curves)
    names = labels or [f"point {i + 1} of {len(several)}" for i in range(len(several))]
    return [
        Panel(
            name="spectral_densities",
            title=f"Density of the eigenvalues at {len(several)} points, smoothed by {width:.2g}",
            xlabel="eigenvalue",
            ylabel="share of eigenvalues per unit",
            series=[
                Series(names[i], points, np.where(curve > least, curve, np.nan), "line", number)
                for number, (i, curve) in enumerate(zip(shown, curves, strict=True))
            ],
            yscale="log",
        )
    ]


def _check_one(found: SpectralDensity) -> None:
    if found.nodes.ndim != 2:
        raise ValueError(f"plot: expected densities of nodes (probes, steps), got nodes {found.nodes.shape}")


def _range_of(several: Sequence[SpectralDensity], *others: float) -> tuple[np.ndarray, float]:
    """Points over all nodes and 0, and a width to smooth by."""
    low = min(*(float(one.nodes.min()) for one in several), 0.0)
    high = max(*(float(one.nodes.max()) for one in several), *others, 0.0)
    width = max(high - low, 1e-30) / 150
    return np.linspace(low - 4 * width, high + 4 * width, 800), width


def of_landscape(found: Landscape) -> list[Panel]:
    """The loss along one direction, beside its parabola; or on a plane, as contours."""
    at, losses = np.asarray(found.coordinates), np.asarray(found.losses)
    curvatures = [f"{float(value):.3g}" for value in found.curvatures]
    if losses.ndim > 2 or at.ndim != 1:
        raise ValueError(f"plot: expected one landscape, of losses (P,) or (P, P), got {losses.shape}")
    finite = losses[np.isfinite(losses)]
    if not finite.size:
        raise ValueError("plot: no loss of this landscape is finite")
    if losses.ndim == 1:
        # A parabola that leaves the figure would set its scale.
        span = 0.1 * (finite.max() - finite.min())
        parabola = np.asarray(found.parabolas[0])
        within = (parabola >= finite.min() - span) & (parabola <= finite.max() + span)
        return [
            Panel(
                name="landscape",
                title="Loss along a direction d, and what its slope and curvature here foresee",
                xlabel="distance from ω, in lengths of d",
                ylabel="loss",
                series=[
                    Series("loss E(ω + a d)", at, losses, "line", 0),
                    Series(
                        f"parabola of curvature d·Hd = {curvatures[0]}", at, np.where(within, parabola, np.nan),
                        "dashed", 1,
                    ),
                    Series("ω", [0.0], [float(found.centre)], "points", 1),
                ],
            )
        ]  # fmt: skip
    # Rows of the level lines are the vertical axis.
    z = np.where(np.isfinite(losses), losses, np.nan).T
    return [
        Panel(
            name="landscape",
            title="Loss on the plane ω + a d₀ + b d₁",
            xlabel=f"a, along d₀ of curvature {curvatures[0]}",
            ylabel=f"b, along d₁ of curvature {curvatures[1]}",
            series=[Series("ω", [0.0], [0.0], "points", 1)],
            contours=Contours(at, at, z, "loss"),
        )
    ]
