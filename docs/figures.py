"""The pages' figures: ``python -m docs.figures`` draws the first one, and makes PNGs that are named small.

The others are drawn by the library itself: ``jaxnet analyse``, ``jaxnet spectrum``, ``jaxnet experiment NAME`` and
``python examples/lecture.py FOLDER`` write them, and ``python -m docs.figures NAME=PATH …`` puts them here as NAME.png.
"""

import io
import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure

from benchmarks import derived_rate
from benchmarks.timing import save_small
from jaxnet.lab.plots import PALETTE

FOLDER = pathlib.Path(__file__).parent / "figures"
NAMES = {"tuned": "best of a sweep", "derived": "derived, no sweep", "default": "default, 1e-3"}
NAMES |= {"valley": "range test, valley", "steepest": "range test, steepest"}


def first():
    """AdamW's sweeps with the derived rates on them; and how often each method gets as far in time."""
    found = derived_rate.read(FOLDER.parent / "derived-rate")
    figure = Figure(figsize=(10.8, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    dots = []
    for of_workload in found.values():
        for case, of_case in of_workload["cases"].items():
            if not case.startswith("adamw"):
                continue
            lowest = np.array(of_case["sweep"]["constant"], float).min(axis=1)
            best = np.array(of_case["grid"])[lowest.argmin()]
            left.plot(np.array(of_case["grid"]) / best, lowest / lowest.min(), color="0.75", linewidth=0.9)
            for seed in of_case["seeds"]:
                derived, tuned = (min(map(float, seed["curves"]["constant"][name])) for name in ("derived", "tuned"))
                dots.append((seed["rates"]["derived"] / best, derived / tuned))
    left.plot(
        *np.transpose(dots),
        "o",
        color=PALETTE[1],
        markersize=4,
        label="derived rate, against the best rate with the same seed",
    )
    left.plot([], [], color="0.75", label="a sweep")
    left.set(xscale="log", yscale="log", xlim=(1 / 64, 64), ylim=(0.5, 8))
    left.set(xlabel="learning rate / the best of the sweep", ylabel="held-out loss / that at the best rate")
    left.set_xticks([1 / 32, 1 / 8, 1 / 2, 2, 8, 32], labels=["1/32", "1/8", "1/2", "2", "8", "32"])
    left.set_yticks([0.5, 1, 2, 4, 8], labels=["1/2", "1", "2", "4", "8"])
    left.minorticks_off()
    left.set_title("Derived rates lie in the valley of the sweep", fontsize=10.5, loc="left")
    left.legend(fontsize=8, edgecolor="none", loc="upper center", framealpha=0.9)
    shares = {name: of[0] for name, of in derived_rate.profile(list(derived_rate.judged(found)), [1.5]).items()}
    names = sorted(shares, key=shares.get)
    colours = [{"derived": PALETTE[1], "tuned": "0.35"}.get(name, PALETTE[4]) for name in names]
    bars = right.barh([NAMES.get(name, name) for name in names], [shares[name] for name in names], color=colours)
    right.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    right.set_title("Runs as good as a sweep's best, in 1.5 × its epochs", fontsize=10.5, loc="left")
    right.set_xlim(0, 0.7)
    right.tick_params(axis="y", labelsize=8.5)
    right.set_xlabel("share of runs")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture)
    return picture


if __name__ == "__main__":
    if len(sys.argv) == 1:
        save_small(first(), FOLDER / "derived_rate.png")
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        save_small(path, FOLDER / f"{name}.png")
