"""Every result of the library as a figure that holds its numbers."""

import inspect
import json
import subprocess
import sys
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnet
from jaxnet import curvature, learning_rate, losses, nn, per_example, training
from jaxnet.lab import _panels, experiments
from jaxnet.lab._panels import MeasuredSgdStability, MeasuredStability
from jaxnet.lab.record import Record, to_json

KEY = jax.random.key(0)


def problem():
    model = nn.mlp([3, 2], activation=jnp.tanh)
    keys = jax.random.split(KEY, 2)
    inputs = jax.random.normal(keys[0], (24, 4))
    labels = (inputs[:, 0] * inputs[:, 1] > 0).astype(jnp.int32)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    return loss, model.init(keys[1], (4,)), (inputs, labels)


LOSS, PARAMS, BATCH = problem()
HELD_OUT = jax.tree.map(lambda x: x[::2], BATCH)


@pytest.fixture(scope="module")
def analysis():
    return learning_rate.analyse(LOSS, PARAMS, BATCH, key=KEY)


@pytest.fixture(scope="module")
def operator():
    return curvature.hessian(LOSS, PARAMS, BATCH)


@pytest.fixture(scope="module")
def followed():
    """Tracks of four gradient steps: the first by itself, and all as a scan stacks them."""
    tracker = curvature.track(LOSS, BATCH, key=KEY)
    first = tracker.init(PARAMS)

    def step(carry, _):
        params, track = carry
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(LOSS)(params, BATCH))
        track = tracker.update(track, params)
        return (params, track), track

    return first, jax.lax.scan(step, (PARAMS, first), None, length=4)[1]


@pytest.fixture(scope="module")
def fitted():
    tracker = curvature.track(LOSS, BATCH, key=KEY).observer(PARAMS)
    result = training.fit(
        LOSS, PARAMS, BATCH, optax.sgd, learning_rate=0.5, batch_size=8, num_epochs=3, key=KEY, validation=HELD_OUT,
        metrics={"size": lambda params, batch: optax.tree.norm(params)}, observers=[tracker],
    )  # fmt: skip
    return result, tracker


def swept(count, **options):
    return training.sweep(
        LOSS, PARAMS, BATCH, optax.sgd, learning_rates=np.geomspace(0.1, 2, count), batch_size=8, num_epochs=2, key=KEY,
        **options,
    )  # fmt: skip


def axes_of(result, panels):
    """The axes of its figure, all of them named and none with a cut title."""
    figure = jaxnet.plot(result)
    assert type(figure).__name__ == "Figure"
    assert len(figure.axes) == panels
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_title(loc="left")
        assert axes.get_ylabel()
        title = axes.title if axes.title.get_text() else axes._left_title
        assert title.get_window_extent().x1 <= figure.bbox.x1
        assert len(axes.get_lines()) + len(axes.patches)
    return figure.axes


def line(axes, label=None):
    """x and y of the line of that name, or of the first."""
    found = next(one for one in axes.get_lines() if label is None or one.get_label().startswith(label))
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


def bars(axes):
    return [bar.get_height() for bar in axes.patches]


def holds(drawn, *expected):
    for values, wanted in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(values, np.ravel(wanted), rtol=1e-6)


def test_analysis(analysis):
    (axes,) = axes_of(analysis, 1)
    sizes = analysis.batch_sizes
    holds(line(axes, "rate to train at"), sizes, [analysis.rate(b) for b in sizes])
    holds(line(axes, "limit of stability"), sizes, [analysis.limit(b) for b in sizes])
    assert line(axes, "1/λ_max")[1][0] == pytest.approx(float(analysis.optimal))
    plain = json.loads(to_json(analysis.to_dict()))
    np.testing.assert_allclose(plain["limits"], line(axes, "limit of stability")[1], rtol=1e-6)
    assert len(plain["batch_sizes"]) == len(plain["recommended"]) == len(sizes)
    assert plain["rates"]["reason"] == analysis.reason(None)


def test_range_test(analysis):
    found = learning_rate.range_test(
        LOSS, PARAMS, BATCH, optax.sgd, learning_rates=np.geomspace(1e-2, 1e4, 30), batch_size=8, key=KEY,
        analysis=analysis,
    )  # fmt: skip
    (axes,) = axes_of(found, 1)
    end = int(found.diverged)
    holds(line(axes, "loss"), found.rates[:end], found.loss[:end])
    holds(line(axes, "smoothed"), found.rates[:end], found.smoothed[:end])
    for name, value in found.suggestions.items():
        if np.isfinite(value):
            assert line(axes, name)[0][0] == pytest.approx(float(value))


def measured():
    """Growth |η − 1| of E = ½ω² at ω₀, whose limit is 2; the last run overflowed."""
    rates = jnp.array([1.5, 1.9, 2.1, 2.5])
    plain = jnp.array([[1.0, 0.25], [1.0, 0.81], [1.0, 1.21], [1.0, jnp.inf]])
    growth = jnp.abs(1 - rates) * jnp.ones((3, 1))
    return MeasuredStability(rates, growth, jnp.array([1.99, 2.0, 2.01]), plain, jnp.array([1.9, 2.1]))


def test_measured_stability():
    found = measured()
    plain, growth = axes_of(found, 2)
    holds(line(plain, "loss after 1 steps"), found.rates, [0.25, 0.81, 1.21, 100.0])
    holds(line(growth, "measured, from"), found.rates, found.growth[0])
    assert line(growth, "measured loss of stability")[0][0] == pytest.approx(2.0)
    # Beside what was predicted, as `jaxnet analyse` draws it.
    _, panel = _panels.of_measured(found, 2.0)
    assert [one.label for one in panel.lines] == ["2/λ_max", "neither grows nor dies"]
    np.testing.assert_allclose(panel.series[1].y, [0.5, 0.9, 1.1, 1.5], rtol=1e-6)


def test_measured_sgd_stability():
    rates = jnp.array([[2.0, 2.0], [1.0, 1.0], [1.5, 0.5]])
    (axes,) = axes_of(MeasuredSgdStability(jnp.array([1.25, 0.75]), rates, rates**2), 1)
    tried = [0.5, 1.0, 1.0, 1.5, 2.0, 2.0]
    holds(line(axes, "measured, from"), tried, np.square(tried))
    assert line(axes, "measured limit")[0][0] == 1.0


def test_stability():
    found = learning_rate.Stability(jnp.asarray(0.5), jnp.asarray(2.0), {}, jnp.asarray(9))
    (axes,) = axes_of(found, 1)
    assert bars(axes) == [0.5, 2.0]
    assert "0.25 of it" in axes.get_title(loc="left")
    (axes,) = axes_of(jax.tree.map(lambda x: jnp.stack([x, 2 * x, x]), found), 1)
    holds(line(axes, "rate"), [0, 1, 2], [0.5, 1.0, 0.5])
    holds(line(axes, "limit"), [0, 1, 2], [2.0, 4.0, 2.0])


def test_sharpness(followed):
    found = curvature.sharpness(LOSS, PARAMS, BATCH, key=KEY, sampling_error=True)
    (axes,) = axes_of(found, 1)
    np.testing.assert_allclose(bars(axes), [found.value, found.upper_bound], rtol=1e-6)
    assert line(axes, "λ_max − sampling")[1][0] == pytest.approx(float(found.value - found.sampling_error))
    first, stacked = followed
    (axes,) = axes_of(stacked.sharpness, 1)  # warm starts: without an upper bound
    holds(line(axes), range(4), stacked.sharpness.value)
    assert len(axes.get_lines()) == 1


def test_track(followed):
    first, stacked = followed
    holds(line(*axes_of(first, 1)), [0], first.sharpness.value)
    holds(line(*axes_of(stacked, 1)), [1, 2, 3, 4], stacked.sharpness.value)
    both = [first.sharpness.value, *stacked.sharpness.value]
    for several in ([first, stacked], [first, *(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(4))]):
        holds(line(*axes_of(several, 1)), range(5), both)


def test_track_observer(fitted):
    tracker = fitted[1]
    (axes,) = axes_of(tracker, 1)
    holds(line(axes), [0, 1, 2, 3], [check.value for check in tracker.checks])


def test_spectral_density(operator):
    found = curvature.spectral_density(operator, key=KEY, num_probes=4)
    (axes,) = axes_of(found, 1)
    x, y = line(axes, "mean of 4")
    shown = np.isfinite(y)
    width = (max(found.nodes.max(), 0) - min(found.nodes.min(), 0)) / 150
    np.testing.assert_allclose(y[shown], found.density(jnp.asarray(x), width)[0][shown], rtol=1e-3)
    # All of the eigenvalues' mass is drawn.
    assert np.trapezoid(np.nan_to_num(y), x) == pytest.approx(1, abs=0.01)
    # Counted, and beside those known one by one, as `jaxnet spectrum` draws it.
    (panel,) = _panels.of_density(found, count=20, tops=[0.5], smallest=-0.1)
    x, y = (np.asarray(values) for values in (panel.series[0].x, panel.series[0].y))
    assert np.trapezoid(np.nan_to_num(y), x) == pytest.approx(20, rel=0.02)
    assert panel.series[-1].x == [0.5]
    assert panel.lines[0].value == -0.1


def test_spectral_densities_along_a_run(operator):
    """Listed, as an observer collects them, and stacked, as a scan does."""
    several = [curvature.spectral_density(s * operator, key=KEY, num_probes=2, num_steps=8) for s in (1.0, 2.0, 4.0)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *several)
    for found in (several, stacked):
        (axes,) = axes_of(found, 1)
        width = (max(several[2].nodes.max(), 0) - min(several[2].nodes.min(), 0)) / 150
        for i, one in enumerate(several):
            x, y = line(axes, f"point {i + 1} of 3")
            shown = np.isfinite(y)
            np.testing.assert_allclose(y[shown], one.density(jnp.asarray(x), width)[0][shown], rtol=1e-3)
            assert np.trapezoid(np.nan_to_num(y), x) == pytest.approx(1, abs=0.01)
    (axes,) = axes_of([several[0]] * 30, 1)
    assert len(axes.get_lines()) == 7
    assert line(axes, "point 30 of 30")
    with pytest.raises(ValueError, match="densities of nodes"):
        jaxnet.plot(jax.tree.map(lambda x: x[None], stacked))


def test_landscape(operator):
    pairs = curvature.eigsh(operator, 2, key=KEY)
    found = curvature.landscape(LOSS, PARAMS, BATCH, jax.tree.map(lambda x: x[0], pairs.vectors), num_points=9)
    (axes,) = axes_of(found, 1)
    holds(line(axes, "loss"), found.coordinates, found.losses)
    x, y = line(axes, "parabola")
    near = np.isfinite(y)
    assert near.any()
    np.testing.assert_allclose(y[near], found.parabolas[0][near], rtol=1e-6)
    assert f"{float(found.curvatures[0]):.3g}" in axes.get_legend().get_texts()[1].get_text()
    plane = curvature.landscape(LOSS, PARAMS, BATCH, pairs.vectors, num_points=5)
    (panel,) = _panels.of(plane)
    np.testing.assert_array_equal(panel.contours.z, plane.losses.T)
    axes_of(plane, 1)
    with pytest.raises(ValueError, match="no loss of this landscape is finite"):
        jaxnet.plot(jax.tree.map(lambda x: x * jnp.nan, plane))


def test_critical_sharpness():
    found = learning_rate.critical_sharpness(LOSS, PARAMS, BATCH)
    assert bars(axes_of(found, 1)[0]) == [pytest.approx(float(found.value))]
    several = jax.tree.map(lambda x: jnp.stack([x, x]), found)
    holds(line(axes_of(several, 1)[0], "λ_c"), [0, 1], [found.value] * 2)


def test_eigenpairs(operator):
    found = curvature.eigsh(operator, 3, key=KEY)
    values, residuals = axes_of(found, 2)
    holds(line(values), [1, 2, 3], found.values)
    holds(line(residuals), [1, 2, 3], found.residual_norms)


def test_fit_result(fitted):
    result = fitted[0]
    by_epoch, by_step, metric = axes_of(result, 3)
    history = result.history
    holds(line(by_epoch, "training"), [1, 2, 3], history.loss)
    holds(line(by_epoch, "validation"), [1, 2, 3], history.validation["loss"])
    assert line(by_epoch, "lowest")[0][0] == result.best.epoch
    holds(line(by_step), np.arange(1, 10), history.step_loss)
    holds(line(metric, "training"), [1, 2, 3], history.metrics["size"])
    holds(line(metric, "validation"), [1, 2, 3], history.validation["size"])
    assert by_epoch.get_title(loc="left") == "Training ran all its epochs, to step 9"


def test_sweep():
    runs = swept(3, validation=HELD_OUT)
    training_loss, validation_loss, final = axes_of(runs, 3)
    for number, run in enumerate(runs):
        holds(line(training_loss, f"run {number}"), [1, 2], run.history.loss)
        holds(line(validation_loss, f"run {number}"), [1, 2], run.history.validation["loss"])
    holds(line(final, "training"), range(3), [run.history.loss[-1] for run in runs])
    holds(line(final, "validation"), range(3), [run.history.validation["loss"][-1] for run in runs])


def test_a_sweep_of_many_runs_names_those_that_can_be_told_apart():
    runs = swept(24)
    stopped = runs[0].stopped._replace(reason="diverged")
    nowhere = runs[0].history.loss * np.array([1, np.nan])
    history = jax.tree.map(lambda x: x, runs[0].history)
    runs[0] = runs[0]._replace(stopped=stopped, history=type(history)(**{**vars(history), "loss": nowhere}))
    training_loss, final = axes_of(runs, 2)
    labels = training_loss.get_legend_handles_labels()[1]
    assert labels == ["run 0, diverged", *(f"run {number}" for number in range(1, 21))]
    looks = {(one.get_color(), one.get_linestyle(), one.get_marker()) for one in training_loss.get_lines()[:21]}
    assert len(looks) == 21
    assert "1 diverged" in final.get_title(loc="left")
    holds(line(final, "training"), range(24), [run.history.loss[-1] for run in runs])


def test_noise_scale():
    found = per_example.noise_scale(LOSS, PARAMS, BATCH)
    x, y = line(*axes_of(found, 1))
    np.testing.assert_allclose(x * y, float(found.trace), rtol=1e-6)
    resolved = type(found)(*(jnp.asarray(value) for value in (8.0, 1.0, 16.0, 2.0, 2.5, True)))
    (axes,) = axes_of(resolved, 1)
    assert line(axes, "|G|²")[1][0] == 2.0
    assert line(axes, "B_simple")[0][0] == 8.0
    assert line(axes, "S/B")[0].tolist() == [1, 2, 4, 8, 16, 32]


def test_record():
    found = experiments.run("inference")
    for axes, panel in zip(axes_of(found, len(found.panels)), found.panels, strict=True):
        assert axes.get_title(loc="left") == panel.title
    with pytest.raises(ValueError, match="'empty' declares no panels"):
        jaxnet.plot(Record("empty", "", {}, 0, "float32"))


ROOMS = (curvature, learning_rate, per_example, training)
# Results, and what else is a class, of which no figure would tell anything.
REFUSED = {
    "Best", "Checkpoints", "ClippedGrad", "Clipping", "Differences", "Eigensolver", "Estimate", "FitProgress",
    "History", "JsonLines", "Leading", "LinearOperator", "NoiseAverage", "NoisyCurvature", "OnlineSharpness",
    "PerExampleGradients", "ScaleBySharpnessState", "Solution", "Space", "StopRule", "Stopped", "TensorBoard",
    "Tracker", "TrainState", "ValueFn", "WithNoiseScaleState",
}  # fmt: skip
DRAWN = {
    "Analysis", "CriticalSharpness", "Eigenpairs", "FitResult", "Landscape", "MeasuredSgdStability",
    "MeasuredStability", "NoiseScale", "RangeTest", "Sharpness", "SpectralDensity", "Stability", "Track",
    "TrackObserver",
}  # fmt: skip


def exported():
    named = {name: getattr(room, name) for room in ROOMS for name in room.__all__}
    return {name: value for name, value in named.items() if inspect.isclass(value)}


def test_every_result_that_the_library_exports_is_drawn_or_refused():
    classes = exported()
    assert {kind.__name__ for kind in _panels._DRAWN} == {*DRAWN, "Record"}
    assert set(classes) <= DRAWN | REFUSED, "a new class: say whether jaxnet.plot draws it"
    assert set(classes) >= DRAWN
    for name in REFUSED & set(classes):
        kind = classes[name]
        if typing.get_origin(kind) is None and not isinstance(kind, types.UnionType):
            with pytest.raises(TypeError, match=f"got {name}$"):
                jaxnet.plot(object.__new__(kind) if not issubclass(kind, tuple) else tuple.__new__(kind))


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (3.0, "float"),
        ("digits", "str"),
        ([], "a list of nothing"),
        ((1, "a"), "a tuple of int, str"),
        (BATCH, "a tuple of ArrayImpl"),
    ],
)
def test_anything_else_is_a_type_error_in_one_sentence(thing, words):
    with pytest.raises(TypeError) as caught:
        jaxnet.plot(thing)
    text = str(caught.value)
    assert text.startswith("plot: expected one of Analysis, RangeTest, ")
    assert text.endswith(f"or a list of one of Track, SpectralDensity, FitResult; got {words}")
    assert "\n" not in text
    for name in DRAWN:
        assert name in text


def test_two_leading_axes_are_refused(followed):
    with pytest.raises(ValueError, match="one leading axis"):
        jaxnet.plot(jax.tree.map(lambda x: x[None], followed[1]))


def test_without_matplotlib_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxnet\[app\]'"):
        jaxnet.plot(measured())


def test_plotting_touches_no_global_state_and_importing_loads_no_plotting():
    program = """
import sys, jax.numpy as jnp, jaxnet
assert not [name for name in sys.modules if name.startswith(("jaxnet.lab", "matplotlib"))]
jaxnet.plot(jaxnet.learning_rate.Stability(jnp.ones(()), jnp.ones(()), {}, jnp.ones(())))
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
