"""Timing side by side: the contenders take turns, so that a drift of the machine meets all of them."""

import dataclasses
import datetime
import io
import os
import platform
import statistics
import time

import jax
from PIL import Image

from jaxnet.lab.plots import draw
from jaxnet.lab.record import to_json, versions

# Of a figure that is kept: no wider than a page, in few colours.
WIDTH, COLOURS = 1080, 48


@dataclasses.dataclass
class Row:
    """One comparison: a ratio, and the bound that it should keep."""

    what: str
    ratio: float
    bound: float
    at_least: bool
    seconds: dict

    @property
    def kept(self):
        return self.ratio >= self.bound if self.at_least else self.ratio <= self.bound


def side_by_side(contenders, repeats=9):
    """Median seconds of each contender, name -> function whose result is waited for; one warm-up each."""
    for run in contenders.values():
        jax.block_until_ready(run())
    times = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def finish(rows, path, panels=()):
    """Print each ratio beside its bound, write the numbers, and draw the panels beside them."""
    width = max(len(row.what) for row in rows)
    print(f"{'what':{width}}  {'ratio':>8}  {'bound':>8}")
    for row in rows:
        relation = ">=" if row.at_least else "<="
        verdict = "" if row.kept else "  MISS"
        print(f"{row.what:{width}}  {row.ratio:8.2f}  {relation} {row.bound:5g}{verdict}")
    machine = {"platform": platform.platform(), "processors": os.cpu_count(), "device": str(jax.devices()[0])}
    found = {"date": datetime.date.today().isoformat(), "versions": versions(), "machine": machine}
    found["rows"] = [dataclasses.asdict(row) for row in rows]
    if panels:
        found["panels"] = [dataclasses.asdict(panel) for panel in panels]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(found) + "\n")
    for name, figure in draw(panels).items():
        figure.savefig(picture := io.BytesIO())
        save_small(picture, path.with_name(f"{path.stem}-{name}.png"))
    print(f"wrote {path}")


def save_small(picture, path):
    """A figure as a PNG of some ten kilobytes, on white."""
    image = Image.open(picture).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path}, {path.stat().st_size / 1000:.0f} kB")
