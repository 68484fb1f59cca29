"""The command line, as a process."""

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxnet.lab import analyse, cli, record, report

COMMAND = [sys.executable, "-m", "jaxnet"]


def jaxnet(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=240, **options)


def fails(words, *arguments):
    done = jaxnet(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


SMALL = ("--data", "two-gaussians", "--model", "linear", "--num-epochs", 4, "--batch-size", 10)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "out"
    return jaxnet("analyse", *SMALL, "--out", folder, "--seed", 3), folder


def test_analyse_writes_a_record_and_figures(small):
    done, folder = small
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar where there is no terminal
    figures = (
        *("loss_against_epoch", "sharpness_along_training", "loss_against_rate", "stability_against_rate"),
        *("rate_against_batch_size", "loss_against_learning_rate"),
    )
    assert {"record.json", "report.html", *(f"{name}.png" for name in figures)} == {
        path.name for path in folder.iterdir()
    }
    found = json.loads((folder / "record.json").read_text())
    assert found["seed"] == 3
    assert found["config"]["data"] == "two-gaussians"
    assert found["measurements"]["sharpness"]["converged"] is True
    runs = found["measurements"]["runs"]
    assert [run["batch_size"] for run in runs] == [None, 10, 1]
    assert all(len(run["sharpness"]) == len(run["loss"]) == 5 for run in runs)
    for word in ("λ_max", "1/λ_max", "2/λ_max", "loses stability", "plain training"):
        assert word in done.stdout


@pytest.mark.slow
def test_spectrum_writes_a_record_and_figures(tmp_path):
    given = "--num-eigenvalues", 3, "--num-epochs", 1, "--batch-size", 10, "--dtype", "float64"
    done = jaxnet("spectrum", *SMALL, *given, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    figures = ("top_eigenvalues", "sharpness_of_parts", "spectral_density", "spectral_densities")
    names = {"record.json", "report.html", *(f"{name}.png" for name in figures)}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    found = json.loads((tmp_path / "out" / "record.json").read_text())
    values = found["measurements"]["eigenvalues"]
    # The linear neuron on two Gaussians: 1 of the bias, .80 + σ² and σ² of the weights, give or take the draw.
    np.testing.assert_allclose(values, [1.0, 0.84, 0.04], rtol=0.2)
    np.testing.assert_allclose(found["measurements"]["smallest"], values[2], rtol=1e-5)
    # A quadratic's Hessian is the same at the start.
    np.testing.assert_allclose(found["measurements"]["initial"]["nodes"], found["measurements"]["nodes"], rtol=1e-6)
    assert abs(found["measurements"]["trace"] - sum(values)) <= 4 * found["measurements"]["trace_error"]
    assert all(claim["passed"] for claim in found["claims"])
    for word in ("λ_3", "λ_min", "weights without biases", "trace"):
        assert word in done.stdout


def test_the_linear_neuron_is_predicted_and_measured(small):
    """Centred data: λ_max is the bias's 1, and both measured limits are 2."""
    found = json.loads((small[1] / "record.json").read_text())["measurements"]
    np.testing.assert_allclose(found["sharpness"]["value"], 1.0, rtol=0.01)
    np.testing.assert_allclose(found["ladder"]["limit"], found["rates"]["maximal"], rtol=5e-3)
    low, high = found["ladder"]["plain_bracket"]
    assert low < found["rates"]["maximal"] * 1.001
    assert high > found["rates"]["maximal"] * 0.999


def test_a_job_goes_on_from_what_it_had(small):
    """The last stage, in another process than the stages before."""
    path = small[1] / "record.json"
    whole = record.Record.from_json(path.read_text())
    measured = {name: value for name, value in whole.measurements.items() if name != "ladder"}
    panels = [panel for panel in whole.panels if panel.name not in ("loss_against_rate", "stability_against_rate")]
    begun = dataclasses.replace(
        whole, measurements=measured, claims=whole.claims[1:], rows=whole.rows[:-2], panels=panels
    )
    config = analyse.AnalyseConfig(data="two-gaussians", model="linear", num_epochs=4, batch_size=10, seed=3)
    grown = list(analyse.stages(config, begun=begun))
    assert len(grown) == 2
    assert grown[-1].to_json() + "\n" == path.read_text()
    (done,) = analyse.stages(config, begun=grown[-1])
    assert done.to_json() == grown[-1].to_json()


@pytest.mark.slow
def test_a_job_that_is_killed_and_resumed_leaves_the_same_record(small, tmp_path):
    arguments = ["analyse", *map(str, SMALL), "--seed", "3", "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, runs = tmp_path / "out" / "record.json", 0
    while process.poll() is None and not runs:
        time.sleep(0.01)
        runs = len(json.loads(path.read_text())["measurements"]["runs"]) if path.exists() else 0
    process.kill()
    process.wait()
    assert 1 <= runs < 3
    fails("resume: the job was begun with --seed 3, now 4; start anew", *arguments, "--seed", 4, "--resume")
    done = jaxnet(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert path.read_text() == (small[1] / "record.json").read_text()
    assert {file.name for file in small[1].iterdir()} == {file.name for file in path.parent.iterdir()}


def test_resume_begins_where_there_is_nothing_and_refuses_what_it_cannot_read(tmp_path, capsys):
    (tmp_path / "record.json").write_text("{}")
    assert cli.run(["analyse", "--out", str(tmp_path), "--resume"]) == 2
    assert "record.json: cannot be gone on with, expected a record" in capsys.readouterr().err
    assert report.read_record(tmp_path / "nothing") is None


def test_an_out_that_is_not_empty_is_kept_unless_overwritten(small, tmp_path):
    folder = small[1]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    fails("is not empty; name another folder, or pass --overwrite", "analyse", *SMALL, "--out", folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = jaxnet("experiment", "inference", "--out", folder, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "record.json").read_text())["name"] == "inference"
    # The figures of the record that was replaced are gone with it.
    assert {path.name for path in folder.iterdir()} == {"record.json", "report.html", "activations.png"}
    file = tmp_path / "file"
    file.write_text("kept")
    fails("is a file; name a folder", "analyse", *SMALL, "--out", file)
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("unknown data 'nope': known are digits, two-gaussians, mnist1d, mnist5k", ("--data", "nope")),
        ("no such file", ("--data", "nope.csv")),
        ("invalid choice 'nope' for argument '--model'. Expected one of ('linear', 'mlp'", ("--model", "nope")),
        ("'--activation'. Expected one of ('tanh', 'relu'", ("--activation", "nope")),
        ("'--criterion'. Expected one of ('auto'", ("--criterion", "nope")),
        ("'--optimizer'. Expected one of ('sgd', 'momentum', 'nesterov'", ("--optimizer", "nope")),
        ("'--dtype'. Expected one of ('float32', 'float64')", ("--dtype", "float16")),
        ("batch_size: expected 1 to 1437", ("--batch-size", 2000)),
        ("batch_size: expected 1 to 1437", ("--batch-size", 0)),
        ("learning_rate: expected positive and finite", ("--learning-rate", "-1")),
        ("learning_rate: expected positive and finite", ("--learning-rate", "nan")),
        ("learning_rate: expected positive and finite", ("--learning-rate", "inf")),
        ("learning_rate: expected positive and finite in float32", ("--learning-rate", "1e300")),
        ("num_epochs: expected 1 to 1000000, got 0", ("--num-epochs", 0)),
        ("num_epochs: expected 1 to 1000000", ("--num-epochs", 10**20)),
        ("the network's parameters: expected 1 to 1000000000", ("--widths", 10**6, 10**6)),
        ("seed: expected a whole number", ("--seed", "99999999999999999999")),
        ("invalid literal", ("--batch-size", "many")),
        ("--nope", ("--nope", "3")),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, arguments, tmp_path):
    fails(words, "analyse", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("column 'b' is not numeric", "a,b,c\n1,red,0\n2,5,1\n3,red,0\n"),
        ("holds infinity", "a,b,c\n1,inf,0\n2,1,1\n3,1,0\n"),
        ("columns 1, 3 have the same name 'y'", "y,x,y\n1,2,0\n2,1,1\n3,1,0\n"),
        ("all 4 examples have the label 1", "a,b,c\n1,2,1\n2,1,1\n3,1,1\n3,1,1\n"),
        ("labels are out of range", "a,b,c\n1,2,-1\n2,1,1\n3,1,1\n3,1,1\n"),
    ],
)
def test_bad_files(words, text, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(text)
    fails(words, "analyse", "--data", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_file_of_ones_own_in_double_precision(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    np.savez(tmp_path / "a.npz", features=x, value=x @ [1.0, -2.0, 0.5] + 0.1)
    out = tmp_path / "out"
    done = jaxnet(
        "analyse", "--data", tmp_path / "a.npz", "--inputs", "features", "--targets", "value", "--model", "linear",
        "--dtype", "float64", "--num-epochs", 3, "--batch-size", 8, "--optimizer", "momentum", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "record.json").read_text())
    assert found["dtype"] == "float64"
    # The heavy ball's limit is 1 + β times that of gradient descent.
    np.testing.assert_allclose(
        found["measurements"]["ladder"]["limit"], 1.9 * found["measurements"]["rates"]["maximal"], rtol=5e-3
    )


@pytest.mark.slow
def test_a_rate_that_diverges_says_where_and_keeps_its_history(tmp_path):
    out = tmp_path / "out"
    done = jaxnet("analyse", *SMALL[:4], "--num-epochs", 60, "--learning-rate", 1e4, "--out", out)
    assert done.returncode == 0, done.stderr
    run = json.loads((out / "record.json").read_text())["measurements"]["runs"][0]
    assert run["diverged"] is True
    assert "not finite at step" in run["stopped"]
    assert 1 < len(run["loss"]) < 61
    assert "diverged" in done.stdout


@pytest.mark.slow
def test_kinks_are_measured_in_double_precision(tmp_path):
    path = tmp_path / "a.csv"
    rng = np.random.default_rng(0)
    rows = [f"{a:.4f},{b:.4f},{int(a * b > 0)}" for a, b in rng.normal(size=(60, 2))]
    path.write_text("\n".join(["a,b,label", *rows]))
    out = tmp_path / "out"
    done = jaxnet(
        "analyse", "--data", path, "--activation", "relu", "--widths", 16, 16, "--num-epochs", 2, "--batch-size", 8,
        "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "record.json").read_text())["measurements"]["ladder"]
    np.testing.assert_allclose(found["limit"], found["predicted"], rtol=0.02)


def test_list_and_experiment(tmp_path):
    done = jaxnet("list")
    assert done.returncode == 0
    for name in ("inference", "backprop", "one_dimension", "two_gaussians", "one_epoch", "overfitting"):
        assert name in done.stdout
    done = jaxnet("experiment", "backprop", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "pass" in done.stdout
    fails("unknown experiment 'nope': known are inference", "experiment", "nope", "--out", tmp_path / "other")


def test_a_failed_claim_makes_the_exit_status_1(tmp_path):
    """One weight of the lectures' example changed: its claims must fail, and the command with them."""
    program = (
        "import sys; from jaxnet.lab.experiments import inference; inference.INPUT = (0.5, 0.9, 0.3);"
        "from jaxnet.lab import cli; sys.exit(cli.run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "experiment", "inference", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "MISS" in done.stdout
    assert json.loads((tmp_path / "out" / "record.json").read_text())["claims"][0]["passed"] is False
