"""Each script in examples/ runs as a process of its own, without a warning, and what it prints is true."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.py"))
NUMBER = r"(-?\d[\d.]*(?:e[+-]?\d+)?)"


def run(script, *arguments, folder):
    command = [sys.executable, "-W", "error", str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def numbers(pattern, text):
    """The numbers at each # of the pattern, of all its places in the text."""
    found = re.findall(pattern.replace("#", NUMBER), text, flags=re.MULTILINE)
    assert found, f"nothing like {pattern!r} in:\n{text}"
    return np.array(found, dtype=float)


def named(name):
    return next(script for script in EXAMPLES if script.name == name)


def scripts():
    """Those of one network; of libraries that are alike, one at each run."""
    for script in EXAMPLES:
        if script.name not in ("lecture.py", "equinox_language_model.py"):
            slow = script.name in ("flax_linen.py", "flax_nnx.py", "haiku_model.py", "your_csv.py")
            yield pytest.param(script, id=script.name, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("script", list(scripts()))
def test_the_rate_is_one_over_lambda_and_training_at_it_lowers_the_loss(script, tmp_path):
    text = run(script, folder=tmp_path)
    sharpness, rate = numbers(r"^λ_max +#", text)[0], numbers(r"1/λ_max +(?:= )?#", text)[0]
    np.testing.assert_allclose(sharpness * rate, 1, rtol=1e-3)
    for before, after in numbers(r"^loss.* # to #", text):
        assert after < before / 3
    assert not list(tmp_path.iterdir())  # nothing is written unasked


@pytest.mark.parametrize("name", ["flax_nnx.py", "flax_linen.py", "equinox_model.py", "haiku_model.py"])
def test_another_librarys_script_is_short(name):
    assert len(named(name).read_text().splitlines()) <= 60


@pytest.mark.slow
def test_a_table_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.normal(50, 20, 200), rng.normal(0, 0.01, 200)
    price = 3 * a - 2000 * b + rng.normal(0, 5, 200)
    rows = np.column_stack([a, price, b])
    np.savetxt(tmp_path / "table.csv", rows, "%.6g", ",", header="a,price,b", comments="")
    text = run(named("your_csv.py"), "table.csv", "price", folder=tmp_path)
    assert "2 inputs, a quantity to predict; 120 rows to train on" in text
    assert numbers("variance explained on the test rows: #%", text) > 90


@pytest.mark.slow
def test_the_lecture_tells_the_truth_and_draws(tmp_path):
    text = run(named("lecture.py"), "figures", folder=tmp_path)
    assert "hidden: 0.13 0.96 0.40  output: 0.35 0.85" in text
    np.testing.assert_allclose(numbers("by (?:the rule|jax.grad): +#", text), -0.01631172, rtol=1e-5)
    np.testing.assert_allclose(numbers(r"eigenvalues of H: \[# +#\]", text), [[0.04, 0.84]])
    predicted, measured, error = numbers("predicted #, measured # ± #", text)[0]
    assert abs(measured - predicted) < 0.05 * predicted
    assert error < 0.02 * predicted
    (ruined, derived) = numbers("^B = 1, η = .*: loss # to #", text)
    assert ruined[1] > ruined[0]
    assert derived[1] < derived[0] / 3
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"one_dimension.png", "batch_sizes.png", "paths.png", "plain_training.png", "range_test.png"} == drawn


def test_the_lecture_opens_as_a_notebook():
    """Percent cells: a marker at the top, prose in markdown cells all of comments, code cells that are short."""
    head, *cells = re.split(r"^# %%", named("lecture.py").read_text(), flags=re.MULTILINE)
    assert head == ""
    prose = [cell for cell in cells if cell.startswith(" [markdown]\n")]
    assert 15 < len(prose) < len(cells)
    for cell in cells:
        lines = cell.strip().splitlines()
        if cell in prose:
            assert all(line.startswith("#") for line in lines[1:])
        assert len(lines) < 35


@pytest.mark.slow
def test_the_language_model_does_better_at_the_derived_rate(tmp_path):
    text = run(named("equinox_language_model.py"), folder=tmp_path)
    assert numbers(r"^decided for the price of # gradients", text)[0] <= 30
    derived, usual = numbers(r"^held-out loss at the \w+ rate, [\d.e-]+: [\d.]+ to #", text)
    assert derived < usual - 0.3
