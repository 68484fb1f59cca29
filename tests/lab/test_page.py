"""The page that a job leaves: whole, by itself, the answer first."""

import html.parser
import re

import numpy as np

from jaxnet.lab import record, report
from jaxnet.lab.record import Claim, Line, Panel, Record, Series

RECORD = Record(
    name="an <b>odd</b> one",
    question="Is 1 < 2 & 3?",
    config={"out": "a<b"},
    seed=0,
    dtype="float32",
    rows=[("η", 0.123456789, "± <1"), ("none", float("nan"), ""), ("n", 7, "whole")],
    claims=[record.within("a", "one & two", 1.0, 1.001, 0.01), record.below("b", "x < y", 1.0, 2.0)],
    panels=[
        Panel(f"p{i}", "title", "x", "y", [Series("s", [1, 2, 4], [1.0, 2.0, 3.0])], [Line("l", 2.0)], xscale="log2")
        for i in range(2)
    ],
    answer=["Train at 3 < 4."],
)


class Reader(html.parser.HTMLParser):
    """Which tags are open where, and all that a page asks of anyone else."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tags, self.outside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action") and not value.startswith("#"):
                self.outside.append(value)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_stands_by_itself(tmp_path):
    paths = report.write(RECORD, tmp_path)
    assert [path.name for path in paths] == ["record.json", "report.html", "p0.png", "p1.png"]
    text = (tmp_path / "report.html").read_text()
    read = Reader(text)
    assert not read.open
    assert not read.outside
    assert "script" not in read.tags
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert read.tags.count("svg") == 2
    words = " ".join(read.texts)
    for expected in ("an <b>odd</b> one", "Is 1 < 2 & 3?", "one & two", "0.12346", "–", "a<b", "± <1"):
        assert expected in words
    assert words.index("Train at 3 < 4.") < words.index("one & two") < words.index("0.12346")
    assert read.texts.count("pass") == read.texts.count("MISS") == 1
    assert "prefers-color-scheme: dark" in text


def test_without_an_answer_of_its_own_a_record_tells_how_its_claims_fared():
    claim = lambda key, passed: Claim(key, f"claim {key}", 1.0, 1.0, passed, "")
    of = lambda *claims: report.answer(Record("n", "q", {}, 0, "float32", claims=claims))
    assert of() == []
    assert of(claim("a", True)) == ["The claim holds."]
    assert of(claim("a", True), claim("b", True)) == ["All 2 claims hold."]
    assert of(claim("a", True), claim("b", False)) == ["1 of 2 claims do not hold: claim b."]
    assert report.answer(RECORD) == ["Train at 3 < 4."]


def test_curves_that_coincide_are_both_seen():
    from jaxnet.lab import plots

    x = np.arange(1, 9)
    series = [Series(name, x, y) for name, y in (("a", x**2), ("b", x**2 + 0.01), ("c", x + 30.0), ("d", x**2))]
    nothing = Series("nothing", x, np.full(8, np.nan))
    panel = Panel("p", "", "", "", [*series, nothing], [Line("l", 3.0), Line("m", 3.001), Line("n", 5.0)])
    axes = plots.draw([panel])["p"].axes[0]
    a, b, c, d, *lines = axes.get_lines()
    assert a.get_linestyle() == c.get_linestyle() == "-"
    assert b.get_linestyle() == d.get_linestyle() == "--"
    # The second and the third are dashed in one another's gaps.
    assert (b._unscaled_dash_pattern[0], d._unscaled_dash_pattern[0]) == (0, 4)
    assert lines[1]._unscaled_dash_pattern == (0, (4, 4))
    assert "nothing" not in axes.get_legend_handles_labels()[1]


def test_what_a_log_axis_cannot_show_does_not_end_a_figure():
    from jaxnet.lab import plots

    x = np.arange(4)
    series = [Series(name, x, y) for name, y in (("a", -x - 1.0), ("b", -x - 1.0), ("c", x + 1.0), ("d", x + 1.0))]
    *_, c, d = plots.draw([Panel("p", "", "", "", series, yscale="log")])["p"].axes[0].get_lines()
    assert (c.get_linestyle(), d.get_linestyle()) == ("-", "--")


def test_batch_sizes_stand_on_an_axis_of_octaves():
    from jaxnet.lab import plots

    panel = Panel("p", "", "", "", [Series("", [1, 32, 500], [1.0, 2.0, 3.0])], xscale="log2")
    figure = plots.draw([panel])["p"]
    figure.canvas.draw()
    shown = {label.get_text() for label in figure.axes[0].get_xticklabels()}
    assert {"4", "64"} <= shown
    assert all(float(text).is_integer() or float(text) < 1 for text in shown if text)
