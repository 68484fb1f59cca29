"""A record as one page of HTML that needs nothing else: no network, no script; light or dark as the screen is."""

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jaxnet.lab import plots
from jaxnet.lab.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #667080; --line: #d9dee4; --tint: #f4f6f8;
  --good: #1a7f4b; --bad: #c0362c }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #15181c; --soft: #98a2ae; --line: #343a42;
  --tint: #1d2126; --good: #4cc38a; --bad: #ff7b6e } figure svg { filter: invert(.91) hue-rotate(180deg) } }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .25rem }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem }
.what { color: var(--soft); margin: 0 0 1rem }
.answer { border-left: 4px solid #0072b2; background: var(--tint); padding: .8rem 1rem; font-size: 1.1rem }
.answer p { margin: .3rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 }
@media (max-width: 30rem) { table { font-size: .78rem } th, td { padding-right: .4rem } }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.pass { color: var(--good) } .miss { color: var(--bad); font-weight: 700 }
figure { margin: 1.2rem 0 } figure svg { width: 100%; height: auto; display: block; background: #fff }
details { margin-top: 1.5rem; color: var(--soft) } summary { cursor: pointer }
pre { overflow-x: auto; font-size: .85rem }
"""


def page(record: Record, answer: Sequence[str]) -> str:
    """The whole of it as one document: the answer first, then claims, figures, numbers, and how they came about."""
    claims = [
        (claim.name, claim.predicted, claim.measured, claim.tolerance, "pass" if claim.passed else "MISS")
        for claim in record.claims
    ]
    parts = [
        f"<h1>{_text(record.question)}</h1>",
        f'<p class="what">jaxnet {_text(record.name)}, seed {record.seed}, {_text(record.dtype)}</p>',
        _answer(answer),
        _section("Claims", ("claim", "predicted", "measured", "bound", "verdict"), claims),
        "".join(map(_figure, plots.draw(record).values())),
        _section("Numbers", ("quantity", "value", "remark"), record.rows),
        _details("Configuration", record.config),
        _details("Versions", record.versions),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>jaxnet: {_text(record.name)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _answer(sentences: Sequence[str]) -> str:
    return f'<div class="answer">{"".join(f"<p>{_text(words)}</p>" for words in sentences)}</div>' if sentences else ""


def _section(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    if not body:
        return ""
    names = "".join(f"<th>{name}</th>" for name in head)
    return f'<h2>{title}</h2><div class="wide"><table><tr>{names}</tr>{body}</table></div>'


def number(value: Any) -> str:
    """A table's entry: five digits of a float, a dash where there is none."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.5g}"
    return str(value)


def _cell(value: Any) -> str:
    if value in ("pass", "MISS"):
        return f'<td class="{value.lower()}">{value}</td>'
    kind = "" if isinstance(value, str) else ' class="number"'
    return f"<td{kind}>{_text(number(value))}</td>"


def _details(title: str, values: Any) -> str:
    rows = "\n".join(f"{name}: {value}" for name, value in values.items())
    return f"<details><summary>{title}</summary><pre>{_text(rows)}</pre></details>"


def _figure(figure: "Figure") -> str:
    """Drawn into the page itself, as letters' outlines: it looks the same wherever it is opened."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    # A page has no use for what names an SVG file's own kind.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return f"<figure>{svg}</figure>"
