import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import curvature, data, learning_rate, losses, nn, per_example, training
from jaxnet.contract import UserError

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def analysed():
    batch = jax.tree.map(lambda x: x[:300], data.digits())
    model = nn.mlp([16, 10])
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    params = model.init(KEY, (64,))
    return loss, params, batch, learning_rate.analyse(loss, params, batch, key=KEY)


def test_its_rates_follow_from_its_parts(analysed):
    loss, params, batch, found = analysed
    sharp = curvature.sharpness(loss, params, batch, key=jax.random.key(9), tol=1e-5)
    np.testing.assert_allclose(found.optimal, 1 / sharp.value, rtol=1e-3)
    np.testing.assert_allclose(found.maximal, 2 / sharp.value, rtol=1e-3)
    assert found.safe_maximal <= found.maximal
    noise = per_example.noise_scale(loss, params, batch)
    np.testing.assert_allclose(found.noise.value, noise.value, rtol=1e-5)


def test_the_rate_grows_with_the_batch_up_to_the_full_one(analysed):
    found = analysed[-1]
    assert found.batch_sizes == (1, 8, 64, 300)
    rates = [float(found.rate(b)) for b in (1, 4, 16, 64, 300, None)]
    assert rates == sorted(rates)
    assert rates[-1] == rates[-2]
    # Where noise decides, nearly in proportion to the batch: over ten keys 5.1 to 6.8 times for 8 times the batch.
    assert 4.5 < float(found.rate(8) / found.rate(1)) < 8.5


def test_between_batch_sizes_it_is_interpolated_and_outside_refused(analysed):
    loss, params, batch, found = analysed
    np.testing.assert_allclose(found.rate(24) ** 2, found.rate(8) * found.rate(72), rtol=0.05)
    few = learning_rate.analyse(loss, params, batch, key=KEY, batch_sizes=[64, 8])
    assert few.batch_sizes == (8, 64)
    with pytest.raises(ValueError, match="batch_size: expected 8 to 64, the sizes that were looked at, got 300"):
        few.rate(None)


@pytest.mark.parametrize("batch_size", [0, -5, 301])
def test_a_batch_has_one_to_n_examples(analysed, batch_size):
    with pytest.raises(ValueError, match="batch_size: expected 1 to 300"):
        analysed[-1].rate(batch_size)


def test_it_prints_as_a_table_and_crosses_jit(analysed):
    found = analysed[-1]
    text = str(found)
    for word in ("λ_max", "1/λ_max", "2/λ_max", "B_simple", "converged"):
        assert word in text
    np.testing.assert_allclose(jax.jit(lambda a: a.rate(4))(found), found.rate(4), rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda p, b: -jnp.mean(p**2) * b.mean(), "no rate follows"),
        (lambda p, b: 0 * p.sum() * b.mean(), "no rate follows"),
        (lambda p, b: jnp.nan * p.sum() * b.mean(), "not finite"),
    ],
)
def test_without_positive_curvature_it_says_so(loss, words):
    with pytest.raises(ValueError, match=words):
        learning_rate.analyse(loss, jnp.ones(3), jnp.ones(4), key=KEY)


def test_in_one_dimension_the_limit_for_a_batch_is_exact():
    """E_n = ½ x_n² (w − 1)²: E(1 − ηh_B)² = 1 at η = 2λ/(λ² + p Var h), by sums over all batches of two."""
    x = jnp.array([1.0, 2.0, 0.5, 1.5])
    loss = lambda w, batch: jnp.mean(0.5 * batch**2 * (w - 1) ** 2)
    found = learning_rate.analyse(loss, jnp.array(3.0), x, key=KEY, batch_sizes=(1, 2, 4))
    h = np.asarray(x) ** 2
    pairs = [(h[i] + h[j]) / 2 for i in range(4) for j in range(i)]
    for size, curvatures in ((1, h), (2, pairs), (4, [h.mean()])):
        growth = np.mean((1 - float(found.limit(size)) * np.array(curvatures)) ** 2)
        np.testing.assert_allclose(growth, 1, rtol=1e-5)
        np.testing.assert_allclose(found.bracket(size)[1], found.limit(size), rtol=1e-5)
    np.testing.assert_allclose(found.limit(None), 2 / h.mean(), rtol=1e-5)


SIZES = (1, 4, 16, 64, 100)


@pytest.mark.parametrize("momentum", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
def test_the_limit_of_a_quadratic_lies_in_its_bracket(momentum, x64):
    """Against the exact limit of SGD; with momentum, against the growth of the second moment of a linear recurrence."""
    neuron = nn.linear_neuron()
    loss = losses.mean_loss(neuron.apply, losses.squared_error)
    x, t = data.two_gaussians_exact()
    params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
    make = functools.partial(optax.sgd, momentum=momentum)
    found = learning_rate.analyse(loss, params, (x, t), key=KEY, tol=1e-8, make_optimizer=make, batch_sizes=SIZES)
    if momentum:
        exact = [limit_with_momentum(np.column_stack([x, np.ones(100)]), size, momentum) for size in SIZES]
    else:
        exact = learning_rate.sgd_stability(loss, params, (x, t), SIZES, replace=False)
    for size, limit in zip(SIZES, np.asarray(exact), strict=True):
        low, high = (float(end) for end in found.bracket(size))
        assert low <= limit * (1 + 1e-6)
        assert limit <= high * (1 + 0.02)
        # The limit, and with it the bracket's margin, is estimated by five random directions.
        assert high / low < 1.6
        assert 0.3 < limit / float(found.limit(size)) < 1.6
    np.testing.assert_allclose(exact[-1], float(found.limit(100)), rtol=1e-3)


def limit_with_momentum(x, batch_size, beta):
    """The rate at which the second moment of (w_t, w_{t−1}) begins to grow, by the dense matrix of its recurrence."""
    n, d = x.shape
    share = (n - batch_size) / (batch_size * (n - 1))
    examples = np.einsum("ni,nj->nij", x, x)
    mean = examples.mean(axis=0)
    deviations = (examples - mean) * share**0.5

    def grows(rate):
        eye, zero = np.eye(d), np.zeros((d, d))
        step = np.block([[(1 + beta) * eye - rate * mean, -beta * eye], [eye, zero]])
        noise = [np.block([[-rate * h, zero], [zero, zero]]) for h in deviations]
        moment = np.kron(step, step) + sum(np.kron(a, a) for a in noise) / n
        return np.abs(np.linalg.eigvals(moment)).max() > 1

    low, high = 1e-6, 2 * (1 + beta) / np.linalg.eigvalsh(mean)[-1] * 1.001
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if grows(middle) else (middle, high)
    return low


def test_is_my_rate_stable(analysed):
    found = analysed[-1]
    low, high = float(found.safe_maximal), float(found.maximal)
    assert found.is_stable(0.99 * low) == "yes"
    assert found.is_stable(1.01 * high) == "no"
    assert found.is_stable((low + high) / 2) == "not resolved"
    assert found.is_stable(0.99 * low, 300) == "yes"
    low, high = (float(end) for end in found.bracket(1))
    assert low < float(found.limit(1)) <= high
    assert high < 2 * low
    assert found.is_stable(0.9 * low, 1) == "yes"
    assert found.is_stable((low * high) ** 0.5, 1) == "not resolved"
    assert found.is_stable(1.01 * high, 1) == "no"
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rate: expected positive and finite"):
            found.is_stable(rate)


def test_it_says_why(analysed):
    found = analysed[-1]
    assert found.to_dict()["rates"]["reason"] == found.reason(None)
    assert found.reason(8).startswith(f"sgd on batches of 8: η = {float(found.rate(8)):.3g} ± ")
    assert str(found).startswith("recommended: sgd on batches of 8: η = ")
    assert float(found.critical_batch_size_error) < float(found.critical_batch_size)


def test_one_figure_for_the_noise_scale_wherever_it_is_shown(analysed):
    found, key = analysed[-1], "critical_batch_size"
    negative = dataclasses.replace(
        found.curvature, along_gradient=-found.curvature.along_gradient, along_noise=-found.curvature.along_noise
    )
    for one in (found, dataclasses.replace(found, curvature=negative)):
        table = {name: (value, remark) for name, value, remark in one.rows()}["critical batch size"]
        kept = one.to_dict()
        np.testing.assert_array_equal([table[0], kept[key]], [one.curvature.noise_scale] * 2)
        np.testing.assert_array_equal(kept[f"{key}_error"], one.curvature.noise_scale_error)
        assert np.isnan(table[0]) == table[1].startswith("no figure") == (one is not found)
        assert "noise_scale" not in kept["curvature"]


def test_the_table_says_why_a_value_is_not_converged(analysed):
    found = analysed[-1]
    remark = lambda **seen: dict(
        (name, words)
        for name, _, words in dataclasses.replace(found, sharpness=dataclasses.replace(found.sharpness, **seen)).rows()
    )["λ_max"]
    assert remark().startswith("converged, ")
    assert remark(converged=False).startswith("NOT converged, ")
    rounded = remark(converged=False, product_error=0.02 * found.sharpness.value)
    assert rounded.startswith("NOT converged: products are off by 0.02 of it, take float64, ")


OPTIMIZERS = {
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adamw": optax.adamw,
    # Of a schedule that takes no traced rate.
    "chain": lambda rate: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, 9, 99))
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "momentum" else ()) for name in OPTIMIZERS]
)
def test_training_at_the_derived_rate_is_near_the_best_of_a_sweep(analysed, name):
    """After five epochs; each rate's loss by the mean of three orders."""
    loss, params, batch, _ = analysed
    make = OPTIMIZERS[name]
    found = learning_rate.analyse(loss, params, batch, key=KEY, make_optimizer=make, batch_sizes=[16])
    rate = float(found.rate(16))
    # Their own schedule runs out; what is held against the sweep is the rate.
    trains = optax.adamw if name == "chain" else make
    factors = 4.0 ** np.arange(-2, 3)
    rates, keys = np.repeat(rate * factors, 3), jnp.tile(jax.random.split(KEY, 3), 5)
    runs = training.sweep(
        loss, params, batch, trains, learning_rates=rates, keys=keys, batch_size=16, num_epochs=5, metrics={"E": loss}
    )
    ends = np.array([run.history.metrics["E"][-1] if run.stopped.reason != "diverged" else np.inf for run in runs])
    ends = ends.reshape(5, 3).mean(axis=1)
    best = factors[ends.argmin()]
    assert 1 / 4 <= best <= 4, dict(zip(factors, ends, strict=True))
    assert found.derived.num_gradients[0] <= 30
    np.testing.assert_array_less(found.derived.probe_losses[1], found.derived.probe_losses[0])


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_rate_for_the_full_batch_keeps_its_budget(analysed, scale):
    """Each step of the probe run costs a gradient of all examples there, also where it fails and begins anew."""
    loss, params, batch, _ = analysed
    steep = lambda p, b: loss(jax.tree.map(lambda x: scale * x, p), b)
    found = learning_rate.analyse(steep, params, batch, key=KEY, batch_sizes=[300], second_moments=False)
    assert found.derived.num_gradients[0] <= 30


def test_a_schedule_falls_in_a_line_from_the_rate(analysed):
    found = analysed[-1]
    schedule, rate = found.schedule(8, 100), float(found.rate(8))
    np.testing.assert_allclose([float(schedule(t)) for t in (0, 50, 100)], [rate, rate / 2, 0], rtol=1e-5)
    # Above the limit of stability here it is led up to.
    above = dataclasses.replace(found.derived, limit=found.derived.rate / 2)
    full, rate = dataclasses.replace(found, derived=above).schedule(None, 100), float(found.rate(None))
    np.testing.assert_allclose([float(full(t)) for t in (0, 10, 55, 100)], [0, rate, rate / 2, 0], rtol=1e-5)
    with pytest.raises(ValueError, match="num_steps"):
        found.schedule(8, 0)


@pytest.mark.parametrize("name", ["momentum", "adamw", "named"])
def test_under_way_it_takes_the_state_as_it_is(analysed, name):
    """On the full batch its limit is that of `stability`, which linearises the update in that state."""
    loss, params, batch, _ = analysed
    make = OPTIMIZERS.get(name, optax.inject_hyperparams(optax.adam))
    optimizer = make(0.01)
    state = training.init_state(params, optimizer)
    update = jax.jit(training.make_update(loss, optimizer))
    for _ in range(20):
        state, _ = update(state, batch)
    wanted = learning_rate.stability(loss, state.params, batch, optimizer, state.opt_state, key=KEY)
    found = learning_rate.analyse(
        loss, state.params, batch, key=KEY, make_optimizer=make, batch_sizes=[8, 300], opt_state=state.opt_state
    )
    np.testing.assert_allclose(found.limit(None), wanted.limit, rtol=3e-3)
    np.testing.assert_allclose(found.rate(None), found.limit(None) / 2, rtol=1e-5)
    assert found.rate(8) < found.rate(None)
    assert "in this state" in found.reason(8)
    shown = {row: value for row, value, _ in found.rows() if "/λ_max" in row or "/upper bound" in row}
    assert list(shown) == (["3.8/λ_max", "3.8/upper bound"] if name == "momentum" else [])
    for value in shown.values():  # the heavy ball's, not gradient descent's
        np.testing.assert_allclose(value, wanted.limit, rtol=2e-2)
    with pytest.raises(ValueError, match="opt_state: expected the state"):
        learning_rate.analyse(loss, params, batch, key=KEY, make_optimizer=optax.rmsprop, opt_state=state.opt_state)


def test_at_a_minimum_no_rate_follows_and_a_limit_does():
    loss = lambda w, batch: 0.5 * jnp.mean(1 + 0 * batch) * jnp.sum(w**2)
    found = learning_rate.analyse(loss, jnp.zeros(3), jnp.ones(6), key=KEY, batch_sizes=[6])
    assert np.isnan(found.rate(6))
    assert "no rate follows" in found.reason(6)
    np.testing.assert_allclose(found.limit(6), 2, rtol=1e-5)
    with pytest.raises(UserError, match="no rate follows"):
        found.schedule(6, 10)


@pytest.mark.parametrize("size", [None, pytest.param(16, marks=pytest.mark.slow)])
def test_the_sampling_error_is_that_of_the_sharpness_alone(x64, size):
    model = nn.mlp([4, 3], activation=jnp.tanh)
    batch = (jax.random.normal(KEY, (40, 5)), jnp.arange(40) % 3)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    loss = losses.chunked(loss, size) if size else loss
    found = learning_rate.analyse(loss, model.init(KEY, (5,)), batch, key=KEY, tol=1e-8).sharpness
    alone = curvature.sharpness(loss, model.init(KEY, (5,)), batch, key=KEY, tol=1e-8, sampling_error=True)
    np.testing.assert_allclose(found.sampling_error, alone.sampling_error, rtol=1e-6)


# Traces of the network, and programs, at a first call.
MOST = {"analyse": (8, 24), "norms": (2, 3), "track": (4, 3)}


def test_a_second_call_with_new_values_traces_and_compiles_nothing():
    traces, programs = [], []
    model = nn.mlp([4, 3])

    def apply(params, x):
        traces.append(None)
        return model.apply(params, x)

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(None)

    loss = losses.mean_loss(apply, losses.softmax_cross_entropy)
    batch = (jax.random.normal(KEY, (40, 5)), jnp.arange(40) % 3)
    calls = {
        "analyse": lambda params: learning_rate.analyse(loss, params, batch, key=KEY),
        "norms": lambda params: per_example.gradients(loss, params, batch).norms(),
        "track": lambda params: curvature.track(loss, batch, key=KEY).init(params),
    }
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for name, call in calls.items():
            start = len(traces), len(programs)
            call(model.init(KEY, (5,)))
            before = len(traces), len(programs)
            most = MOST[name]
            assert before[0] - start[0] <= most[0]
            assert before[1] - start[1] <= most[1]
            call(model.init(jax.random.key(1), (5,)))
            assert (len(traces), len(programs)) == before
            assert min(before) > 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
