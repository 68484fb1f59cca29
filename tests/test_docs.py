"""Every page's code runs as it stands, every docstring's example gives what it says, and the site's own parts work."""

import doctest
import importlib.util
import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxnet
from jaxnet import curvature, data, dataset, learning_rate, losses, nn, per_example, training

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = (curvature, data, dataset, learning_rate, losses, nn, per_example, training)
DEAR = ("README.md", "batch_size.md", "batchnorm_dropout.md", "csv.md", "language_model.md", "tour.md")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages():
    """Those that have code, the dear ones marked."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if PYTHON.search(page.read_text()):
            dear = pytest.mark.slow if page.name in DEAR else ()
            yield pytest.param(page, id=str(page.relative_to(ROOT)), marks=dear)


@pytest.mark.parametrize("page", list(pages()))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, space = page.read_text(), {"__name__": "__main__"}
    for block in PYTHON.finditer(text):
        lines_before = "\n" * (text[: block.start()].count("\n") + 1)  # so that a traceback names the page's own line
        exec(compile(lines_before + block[1], str(page), "exec"), space)


def examples():
    """The public functions and classes whose docstrings have an example."""
    for room in ROOMS:
        for name in room.__all__:
            documented = getattr(room, name)
            if callable(documented) and ">>>" in (inspect.getdoc(documented) or ""):
                yield pytest.param(documented, id=f"{room.__name__}.{name}")


@pytest.mark.parametrize("documented", list(examples()))
def test_the_example_of_a_docstring_is_true(documented):
    given = {"jax": jax, "jnp": jnp, "optax": optax, **{room.__name__.rpartition(".")[2]: room for room in ROOMS}}
    test = doctest.DocTestParser().get_doctest(
        inspect.getdoc(documented), given, documented.__name__, inspect.getsourcefile(documented), 0
    )
    said = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


def test_the_readme_is_short_and_keeps_its_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 130
    for command in ("main", "test"):
        assert len(re.findall(rf"^<!-- {command} command -->\n```bash\npython3 .*\n```$", text, re.MULTILINE)) == 1


def test_the_readmes_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_room_has_its_page_in_the_reference():
    for room in ROOMS:
        name = room.__name__
        assert f"::: {name}\n" in (ROOT / "docs" / "reference" / f"{name.rpartition('.')[2]}.md").read_text()


def test_figures_are_small():
    for path in (ROOT / "docs").rglob("*.png"):
        assert path.stat().st_size < 60_000, path


def test_the_version_has_one_source():
    assert jaxnet.__version__ == importlib.metadata.version("jaxnet")


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_benchmarks_table_is_made_of_its_numbers(hooks, tmp_path):
    rows = [
        {"what": "kept", "ratio": 0.5, "bound": 1.0, "at_least": False},
        {"what": "missed", "ratio": 0.5, "bound": 1.0, "at_least": True},
    ]
    machine = {"processors": 2, "device": "cpu", "platform": "Linux"}
    found = {"date": "2026-01-02", "versions": {"jax": "0.10"}, "machine": machine, "rows": rows}
    (tmp_path / "training.json").write_text(json.dumps(found))
    (tmp_path / "training-steps.png").touch()
    table = hooks.kept("training", tmp_path)
    assert "| kept | ≤ 1 | 0.5 |" in table
    assert "| missed | ≥ 1 | **0.5** |" in table
    assert "2026-01-02, 2 processors, cpu, Linux; jax 0.10" in table
    assert "](benchmarks/training-steps.png)" in table
    assert hooks.kept("curvature", tmp_path) == ""


def test_few_cases_of_a_benchmark_are_columns(hooks):
    row = lambda what, ratio, bound=2.0: {"what": what, "ratio": ratio, "bound": bound, "at_least": False}
    rows = [
        row(f"{case}: {what} ({n if what == 'x' else 1} programs)", n)
        for n, case in enumerate("ab", 2)
        for what in ("x", "y", "z")
    ]
    table = hooks.table([*rows, row("c", "inf", "inf")])
    assert table[0] == "|  | bound | a | b |"
    assert table[2] == "| x | ≤ 2 | 2<br>2 programs | **3**<br>3 programs |"
    assert table[3] == "| y (1 programs) | ≤ 2 | 2 | **3** |"
    assert table[-1] == "| c |  | inf |"


def test_the_lecture_becomes_a_page(hooks):
    page = hooks.lecture((ROOT / "examples" / "lecture.py").read_text())
    assert page.startswith("# From one neuron to the largest learning rate")
    drawn = re.findall(r"!\[.*?\]\(\.\./(figures/lecture/\w+\.png)\)", page)
    assert len(drawn) == 5
    assert all((ROOT / "docs" / name).exists() for name in drawn)
    assert page.count("```") == 2 * len(PYTHON.findall(page))
