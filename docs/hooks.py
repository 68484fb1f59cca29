"""What the site is made of besides its pages, the lecture and the benchmarks' tables, and a look at its reference."""

import collections
import importlib
import json
import pathlib
import re

import numpy as np
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
BENCHMARK = re.compile(r"<!-- benchmark (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def on_files(files, config):
    """Add the lecture, which is a script."""
    script = (ROOT / "examples" / "lecture.py").read_text()
    files.append(File.generated(config, "tutorials/lecture.md", content=lecture(script)))
    return files


def on_page_markdown(markdown, page, config, files):
    """A benchmark whose numbers are kept has its table made of them; of any other the page's own stays."""
    return BENCHMARK.sub(lambda found: kept(found[1]) or found[2], markdown)


def on_post_build(config):
    """Each public name is in the reference, or there is no site."""
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        built = (pathlib.Path(config.site_dir) / "reference" / f"{page.stem}.html").read_text()
        for room in re.findall(r"^::: ([\w.]+)$", page.read_text(), flags=re.MULTILINE):
            public = getattr(importlib.import_module(room), "__all__", ()) if "._" not in room else ()
            if missing := [name for name in public if f'id="{room}.{name}"' not in built]:
                raise PluginError(f"{page.name}: nothing on {', '.join(missing)} of {room}; has it a docstring?")


def lecture(script):
    """Percent cells to a page: prose as it is, code in fences, under each cell the figure that it draws."""
    page = []
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        if "markdown" in head:
            page.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
            continue
        page.append(f"```python\n{body.strip()}\n```")
        for name in re.findall(r'show\((?:Panel\(|\w+, )"(\w+)"', body):
            page.append(f"![What the cell draws: {name.replace('_', ' ')}](../figures/lecture/{name}.png)")
    return "\n\n".join(page) + "\n"


def kept(name, folder=ROOT / "docs" / "benchmarks"):
    """The table of a benchmark's JSON and the figures beside it, or nothing where there is none."""
    path = folder / f"{name}.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    lines = table(found["rows"])
    machine = found["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    lines += [
        "",
        f"{found['date']}, {machine['processors']} processors, {machine['device']}, {machine['platform']}; {versions}.",
    ]
    for figure in sorted(folder.glob(f"{name}-*.png")):
        lines += ["", f"![{figure.stem.replace('_', ' ')}](benchmarks/{figure.name})"]
    return "\n".join(lines) + "\n"


def table(rows):
    """Bounds and what was found; where a few cases have the same rows, ``case: what (how)``, a column for each case."""
    split = [re.fullmatch(r"(?:(.*?): )?(.*?)(?: \((.*)\))?", row["what"]).groups() for row in rows]
    numbers = collections.Counter(case for case, _, _ in split)
    cases = {case for case, number in numbers.items() if case and number > 1}
    if not 1 < len(cases) < len(rows) / len(cases):
        cases = set()
    found = columns([(*parts, row) for row, parts in zip(rows, split, strict=True) if parts[0] in cases])
    alone = columns(
        [("found", row["what"], None, row) for row, (case, *_) in zip(rows, split, strict=True) if case not in cases]
    )
    return [*found, "", *alone] if found and alone else found or alone


def columns(entries):
    """A table of ``(case, what, how, row)``: a line for each ``what``, a column for each case; nothing of nothing."""
    if not entries:
        return []
    cells, bounds, cases = {}, {}, dict.fromkeys(case for case, *_ in entries)
    for case, what, how, row in entries:
        ratio, bound = float(row["ratio"]), float(row["bound"])
        met = ratio >= bound if row["at_least"] else ratio <= bound
        cells.setdefault(what, {})[case] = f"{ratio:.3g}" if met else f"**{ratio:.3g}**", how
        bounds[what] = f"{'≥' if row['at_least'] else '≤'} {bound:g}" if np.isfinite(bound) else ""
    lines = [["", "bound", *cases], ["---"] * (2 + len(cases))]
    for what, of in cells.items():
        # What is the same in all cases is said once.
        hows = {how for _, how in of.values()}
        shown = {case: f"{value}<br>{how}" if len(hows) > 1 and how else value for case, (value, how) in of.items()}
        label = f"{what} ({how})" if len(hows) == 1 and (how := hows.pop()) else what
        lines.append([label, bounds[what], *(shown.get(case, "") for case in cases)])
    return [f"| {' | '.join(part.replace('|', '&#124;') for part in line)} |" for line in lines]
