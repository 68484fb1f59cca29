import dataclasses
import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet.lab import plots, report
from jaxnet.lab.record import Claim, Contours, Line, Panel, Record, Series, above, below, close, slug, within

PANEL = Panel(
    name="curve",
    title="A curve",
    xlabel="learning rate η",
    ylabel="loss",
    series=[Series("a", [1, 2, 3], [1.0, math.inf, 3.0]), Series("b", [1, 2, 3], [2, 2, 2], "points", 0)],
    lines=[Line("2/λ", 2.5), Line("nowhere", math.nan), Line("start", 1.5, "y", 1)],
    contours=Contours([0, 1, 2], [0, 1, 2], np.arange(9.0).reshape(3, 3), "E"),
    xscale="log",
    yscale="log",
)
RECORD = Record(
    name="test",
    question="Is it?",
    config={"a": 1, "path": None},
    seed=3,
    dtype="float32",
    measurements={
        "x": jnp.arange(3),
        "inf": math.inf,
        "nested": {"nan": np.float64("nan"), "yes": np.bool_(True)},
    },
    claims=[within("in", "it is in", 2.0, 2.01, 0.01), below("low", "it is low", 1.0, 2.0)],
    panels=[PANEL],
    rows=[("λ_max", 0.84, "converged")],
)


def test_json_is_strict_and_whole():
    plain = json.loads(RECORD.to_json(), parse_constant=pytest.fail)
    assert plain["measurements"] == {"x": [0, 1, 2], "inf": "inf", "nested": {"nan": "nan", "yes": True}}
    assert plain["claims"][0]["passed"] is True
    assert [(claim["key"], claim["name"]) for claim in plain["claims"]] == [("in", "it is in"), ("low", "it is low")]
    assert plain["panels"][0]["series"][0]["y"] == [1.0, "inf", 3.0]
    assert {"python", "jax", "jaxlib", "optax", "numpy"} <= set(plain["versions"])
    assert not RECORD.passed


def test_a_record_comes_back_from_its_json():
    back = Record.from_json(RECORD.to_json())
    assert back.to_json() == RECORD.to_json()
    assert back.claims == RECORD.claims
    assert back.rows == RECORD.rows
    assert back.measurements["inf"] == math.inf
    assert plots.draw(back).keys() == plots.draw(RECORD).keys()
    for text in ("{}", "[]", "1", RECORD.to_json()[:-9], RECORD.to_json().replace("question", "answer")):
        with pytest.raises(ValueError, match="expected a record in JSON"):
            Record.from_json(text)


@pytest.mark.parametrize(
    ("claim", "passed"),
    [
        (within("key", "", 2.0, 2.09, 0.05), True),
        (within("key", "", 2.0, 2.11, 0.05), False),
        (within("key", "", -2.0, -2.1, 0.06), True),
        (within("key", "", 2.0, math.nan, 0.05), False),
        (within("key", "", math.nan, 2.0, 0.05), False),
        (close("key", "", 0.0, 1e-7, 1e-6), True),
        (close("key", "", 0.0, math.nan, 1e-6), False),
        (below("key", "", 1.0, 0.5), True),
        (below("key", "", 1.0, math.nan), False),
        (above("key", "", 1.0, 1.5), True),
        (above("key", "", 1.0, 1.0), False),
    ],
)
def test_claims(claim, passed):
    assert claim.passed is passed


def test_a_claim_is_found_by_its_key():
    assert RECORD.claim("low") is RECORD.claims[1]
    with pytest.raises(ValueError, match="unknown claim of test 'it is low': known are in, low"):
        RECORD.claim("it is low")


def test_keys_are_different():
    claims = [below(key, "", 1, 0) for key in ("once", "twice", "twice")]
    with pytest.raises(ValueError, match="claims of test: expected different keys, got more than one twice"):
        dataclasses.replace(RECORD, claims=claims)


def test_the_key_of_a_loops_items():
    assert slug("limit", "RMSprop, decay .99", 0.1) == "limit_rmsprop_decay_99_0_1"


def test_a_panel_is_drawn_as_declared():
    (figure,) = plots.draw(RECORD).values()
    axes = figure.axes[0]
    assert axes.get_xlabel() == "learning rate η"
    assert axes.get_ylabel() == "loss"
    assert axes.get_title(loc="left") == "A curve"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["E", "a", "b", "2/λ", "start"]
    first, second = (line for line in axes.get_lines() if line.get_label() in "ab")
    assert np.isnan(first.get_ydata()[1])
    assert first.get_color() == second.get_color()


def test_bars():
    panel = Panel("h", "Histogram", "x", "examples", [Series("n", [0, 1, 2], [3, 4, 5], "bars")])
    (figure,) = plots.draw([panel]).values()
    assert [bar.get_height() for bar in figure.axes[0].patches] == [3, 4, 5]


def test_written_files_are_whole(tmp_path):
    paths = report.write(RECORD, tmp_path / "new")
    assert sorted(path.name for path in paths) == ["curve.png", "record.json", "report.html"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["curve.png", "record.json", "report.html"]
    assert (tmp_path / "new" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_tables_show_misses():
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    for table in report.tables(RECORD):
        console.print(table)
    text = console.export_text()
    for word in ("λ_max", "0.84", "converged", "it is low", "pass", "MISS"):
        assert word in text
    assert report.tables(Record("n", "q", {}, 0, "float32", claims=[Claim("c", "it is", 1.0, 1.0, True, "")]))
