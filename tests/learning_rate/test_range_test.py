import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import data, learning_rate, losses, nn, training
from jaxnet.learning_rate._range_test import range_test

KEY = jax.random.key(0)
RATES = np.geomspace(0.01, 1.5, 40)
CURVATURE = 3.0
ONES = jnp.ones(3)

MODEL = nn.mlp([8, 3])
LOSS = losses.mean_loss(MODEL.apply, losses.softmax_cross_entropy)
PARAMS = MODEL.init(KEY, (4,))
DATA = jax.random.normal(KEY, (20, 4)), jnp.arange(20) % 3


def parabola(params, batch):
    """½ a w² + ½ v², whose v stays at its minimum."""
    return jnp.mean(batch) * (0.5 * CURVATURE * params["w"] ** 2 + 0.5 * params["v"] ** 2)


def prescribed(curve, rates, smoothing=0.0):
    """The test of a loss that takes the given values, step after step: params count the steps."""
    table = jnp.asarray(curve)
    loss = lambda p, batch: jnp.mean(batch) * (table[p["w"].astype(int)] + 0.5 * p["v"] ** 2)
    count = lambda rate: optax.stateless(lambda g, p: {"w": jnp.ones(()), "v": jnp.zeros(())})
    start = {"w": jnp.zeros(()), "v": jnp.zeros(())}
    options = {"learning_rates": rates, "batch_size": None, "smoothing": smoothing, "key": KEY}
    return range_test(loss, start, ONES, count, **options)


def of_parabola(rates=RATES, smoothing=0.0, **options):
    start = {"w": 2 * jnp.ones(()), "v": jnp.zeros(())}
    options = {"batch_size": None, "key": KEY, **options}
    return range_test(parabola, start, ONES, optax.sgd, learning_rates=rates, smoothing=smoothing, **options)


def test_a_parabola_by_hand(x64):
    """w is multiplied by 1 − ηa a step, so L_i = ½ a w₀² Π_{j≤i} (1 − η_j a)²."""
    found = of_parabola()
    by_hand = 0.5 * CURVATURE * 4 * np.cumprod((1 - RATES * CURVATURE) ** 2)
    np.testing.assert_allclose(found.start_loss, 6.0)
    np.testing.assert_allclose(found.loss, by_hand, rtol=1e-10)
    # It falls up to 2/a, and ends where it is above four times its minimum.
    lowest = np.flatnonzero(RATES < 2 / CURVATURE)[-1]
    end = np.flatnonzero((by_hand > 4 * by_hand[lowest]) & (RATES > 2 / CURVATURE))[0]
    assert found.diverged == end
    np.testing.assert_allclose(found.diverged_rate, RATES[end])
    np.testing.assert_allclose(found.smoothed[:end], by_hand[:end])
    assert np.isnan(found.smoothed[end:]).all()
    np.testing.assert_allclose(found.tenth_of_minimum, RATES[lowest] / 10)
    np.testing.assert_allclose(found.steepest, RATES[1 + np.argmin(np.diff(by_hand) / np.diff(np.log(RATES)))])
    np.testing.assert_allclose(found.valley, np.sqrt(RATES[0] * RATES[lowest]))
    np.testing.assert_allclose([found.optimal, found.maximal], [1 / CURVATURE, 2 / CURVATURE], rtol=1e-6)


def test_several_steps_a_rate(x64):
    found = of_parabola(steps_per_rate=3)
    each = 6 * np.cumprod(np.repeat((1 - RATES * CURVATURE) ** 2, 3))
    np.testing.assert_allclose(found.loss, each.reshape(-1, 3).mean(axis=1), rtol=1e-9)


def test_smoothing_is_a_mean_from_both_sides(x64):
    curve = np.array([4.0, 3.5, 3.0, 3.2, 1.0, 2.0])
    found = prescribed(curve, np.geomspace(0.1, 10, 5), smoothing=0.7)
    weights = np.array([[0.7 ** abs(i - j) for j in range(6)] for i in range(6)])
    np.testing.assert_allclose(found.loss, curve[1:])
    np.testing.assert_allclose(found.smoothed, np.average(np.tile(curve, (6, 1)), axis=1, weights=weights)[1:])
    straight = prescribed(np.linspace(4, 3, 41), np.geomspace(0.1, 10, 40), smoothing=0.7)
    np.testing.assert_allclose(straight.smoothed[12:-12], straight.loss[12:-12], rtol=3e-3)  # no lag


@pytest.mark.parametrize("seed", range(5))
def test_the_valley_is_the_longest_of_all_falling_subsequences(seed):
    curve, rates = np.random.default_rng(seed).permutation(10) + 20.0, np.geomspace(0.01, 1, 9)
    after = curve[1:]
    falling = [
        chosen
        for size in range(2, 10)
        for chosen in itertools.combinations(range(9), size)
        if (np.diff(after[list(chosen)]) < 0).all()
    ]
    longest = max(map(len, falling))
    middles = [np.sqrt(rates[c[0]] * rates[c[-1]]) for c in falling if len(c) == longest]
    assert np.isclose(float(prescribed(curve, rates).valley), middles, rtol=1e-4).any()


def test_a_suggestion_without_a_meaning_is_nan():
    rates = np.geomspace(0.1, 1, 4)
    rising = prescribed([1.0, 1.1, 1.2, 1.3, 1.4], rates)
    assert np.isnan([rising.steepest, rising.valley, rising.tenth_of_minimum]).all()
    falling = prescribed([5.0, 4.0, 3.0, 2.0, 1.0], rates)
    assert np.isnan(falling.tenth_of_minimum)  # the minimum may lie beyond the rates
    assert np.isfinite([falling.steepest, falling.valley]).all()
    assert falling.diverged == 4
    assert np.isnan(falling.diverged_rate)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 9.0])
def test_nothing_is_read_off_after_divergence(bad):
    """Beyond the divergence lie the steepest fall and the lowest value."""
    curve = [3.0, 2.8, 2.2, 2.5, bad, 1e-3, 1e-4]
    rates = np.geomspace(0.1, 1, 6)
    found = prescribed(curve, rates)
    assert found.diverged == 3
    np.testing.assert_allclose(found.tenth_of_minimum, rates[1] / 10, rtol=1e-6)
    np.testing.assert_allclose(found.steepest, rates[1], rtol=1e-6)
    np.testing.assert_allclose(found.valley, np.sqrt(rates[0] * rates[1]), rtol=1e-6)
    assert not np.isfinite(found.loss[3]) or found.loss[3] == 9.0  # the curve itself is whole
    at_once = prescribed([3.0, bad * 2, 1.0, 1.0], rates[:3])
    assert at_once.diverged == 0
    assert np.isnan([at_once.steepest, at_once.valley, at_once.tenth_of_minimum]).all()


def test_a_start_without_a_finite_loss_has_diverged_at_once():
    analysis = learning_rate.analyse(LOSS, PARAMS, DATA, key=KEY)
    lost = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    options = {"learning_rates": RATES, "batch_size": None, "key": KEY, "analysis": analysis}
    found = range_test(LOSS, lost, DATA, optax.sgd, **options)
    assert found.diverged == 0
    assert np.isnan(found.smoothed).all()
    assert np.isnan([found.steepest, found.valley, found.tenth_of_minimum]).all()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("start", [0.0, 0.05])
def test_noise_alone_neither_diverges_nor_suggests(batch_size, start):
    """mean(c_n) + ½w² with heavy-tailed c: at w = 0 no rate changes anything, at .05 less than c does by itself."""
    loss = lambda w, c: jnp.mean(c) + 0.5 * jnp.sum(w**2)
    values = jnp.asarray(np.random.default_rng(0).pareto(1.1, 400), jnp.float32)
    params, stable = jnp.full(1, start), np.geomspace(1e-3, 1.9, 60)
    analysis = learning_rate.analyse(loss, params, values, key=KEY, batch_sizes=[batch_size], second_moments=False)
    for seed in range(10):
        key = jax.random.key(seed)
        options = {"learning_rates": stable, "batch_size": batch_size, "key": key, "analysis": analysis}
        found = range_test(loss, params, values, optax.sgd, **options)
        assert found.diverged == 60
        assert np.isnan([found.steepest, found.tenth_of_minimum, found.valley]).all()


def test_noise_does_not_hide_a_divergence():
    """Least squares on Gaussian inputs in d dimensions: the mean square grows beyond 2B/(B + d + 1)."""
    keys = jax.random.split(KEY, 2)
    inputs = jax.random.normal(keys[0], (400, 10))
    batch = inputs, inputs.sum(axis=1) + 0.5 * jax.random.normal(keys[1], (400,))
    loss = lambda w, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)
    analysis = learning_rate.analyse(loss, jnp.zeros(10), batch, key=KEY, batch_sizes=[4], second_moments=False)
    options = {"learning_rates": np.geomspace(1e-4, 10, 60), "batch_size": 4, "analysis": analysis}
    for seed in range(10):
        found = range_test(loss, jnp.zeros(10), batch, optax.sgd, key=jax.random.key(seed), **options)
        # At a rate that rises by a fifth a step it takes some to show.
        assert 1 < found.diverged_rate / (2 * 4 / (4 + 11)) < 10
        assert np.isfinite([found.steepest, found.tenth_of_minimum, found.valley]).all()


def test_a_loss_below_zero_may_fall_by_any_factor():
    found = prescribed([-1.0, -1.5, -3.0, -2.0, -1.5], np.geomspace(0.1, 1, 4))
    assert found.diverged == 4
    np.testing.assert_allclose(found.tenth_of_minimum, np.geomspace(0.1, 1, 4)[1] / 10, rtol=1e-6)


@pytest.mark.parametrize("make", [optax.sgd, functools.partial(optax.sgd, momentum=0.9), optax.adam])
def test_it_is_the_loop_written_out(make):
    """Mini-batches, the optimizer's state carried from rate to rate."""
    rates = np.geomspace(1e-3, 0.3, 9)
    found = range_test(LOSS, PARAMS, DATA, make, learning_rates=rates, batch_size=6, smoothing=0, key=KEY)
    order_key = jax.random.split(KEY)[0]
    batches = [b for epoch in range(4) for b in data.batches(DATA, 6, key=order_key, drop_last=True, epoch=epoch)]
    state, values = training.init_state(PARAMS, make(0.1)), []
    for rate, batch in zip(rates, batches, strict=False):
        state, metrics = training.make_update(LOSS, make(jnp.float32(rate)))(state, batch)
        values.append(metrics["loss"])
    values.append(LOSS(state.params, batches[9]))
    np.testing.assert_allclose(found.start_loss, values[0], rtol=1e-5)
    np.testing.assert_allclose(found.loss, values[1:], rtol=1e-4)


def test_the_theory_is_that_of_analyse_and_of_plain_sgd_only():
    test = functools.partial(range_test, LOSS, PARAMS, DATA, learning_rates=RATES, key=KEY)
    found = test(optax.sgd, batch_size=4)
    analysis = learning_rate.analyse(LOSS, PARAMS, DATA, key=jax.random.split(KEY)[1], batch_sizes=[4])
    expected = [analysis.optimal, analysis.maximal, analysis.rate(4)]
    np.testing.assert_allclose([found.optimal, found.maximal, found.derived], expected, rtol=1e-5)
    given = test(optax.inject_hyperparams(optax.sgd), batch_size=4, analysis=analysis)
    np.testing.assert_allclose([given.optimal, given.maximal, given.derived], expected, rtol=1e-6)
    momentum = functools.partial(optax.sgd, momentum=0.9)
    decayed = lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate))
    for make in (momentum, optax.adam, decayed, optax.sign_sgd):
        other = test(make, batch_size=4, analysis=analysis)
        assert np.isnan([other.optimal, other.maximal, other.derived]).all()
        assert np.isfinite(other.loss[0])
    # One of its own is made for the optimizer at hand, if it is one that has a rate.
    other = test(optax.adam, batch_size=4)
    own = learning_rate.analyse(
        LOSS, PARAMS, DATA, key=jax.random.split(KEY)[1], make_optimizer=optax.adam, batch_sizes=[4]
    )
    np.testing.assert_allclose(other.derived, own.rate(4), rtol=1e-5)
    assert np.isnan(other.optimal)
    assert np.isnan(test(optax.adamax, batch_size=4).derived)


def test_a_rate_held_in_the_state_rises_too():
    plain = of_parabola()
    start = {"w": 2 * jnp.ones(()), "v": jnp.zeros(())}
    make = optax.inject_hyperparams(optax.sgd)
    held = range_test(parabola, start, ONES, make, learning_rates=RATES, batch_size=None, smoothing=0, key=KEY)
    np.testing.assert_allclose(held.loss, plain.loss, rtol=1e-5)


def test_it_changes_nothing_and_repeats_itself():
    make = functools.partial(optax.sgd, momentum=0.9)
    state = training.fit(LOSS, PARAMS, DATA, make, learning_rate=0.1, batch_size=5, num_epochs=2, key=KEY).state
    before = jax.tree.map(np.array, state)
    test = functools.partial(range_test, LOSS, state, DATA, make, learning_rates=RATES, batch_size=5)
    first = test(key=KEY)
    chex.assert_trees_all_equal(state, before)
    chex.assert_trees_all_equal(first, test(key=KEY))
    assert not np.array_equal(first.loss, test(key=jax.random.key(1)).loss)
    # The momentum gathered so far goes on: from the params alone the curve is another.
    fresh = range_test(LOSS, state.params, DATA, make, learning_rates=RATES, batch_size=5, key=KEY)
    np.testing.assert_allclose(fresh.start_loss, first.start_loss, rtol=1e-6)
    assert abs(fresh.loss[1] - first.loss[1]) > 1e-3


def test_new_rates_params_and_data_trace_nothing():
    calls = []

    def loss(params, batch):
        calls.append(1)
        return LOSS(params, batch)

    analysis = learning_rate.analyse(LOSS, PARAMS, DATA, key=KEY)
    test = functools.partial(
        range_test, loss, make_optimizer=optax.sgd, batch_size=6, steps_per_rate=2, analysis=analysis
    )
    test(PARAMS, DATA, learning_rates=RATES, key=KEY)
    first = len(calls)
    other = jax.tree.map(lambda x: x + 1, PARAMS)
    test(other, jax.tree.map(lambda x: x[::-1], DATA), learning_rates=3 * RATES, smoothing=0.5, key=jax.random.key(2))
    assert len(calls) == first > 0


def test_it_prints_as_a_table_and_crosses_jit():
    found = range_test(LOSS, PARAMS, DATA, optax.sgd, learning_rates=RATES, batch_size=4, key=KEY)
    for word in ("steepest", "minimum/10", "valley", "1/λ_max", "2/λ_max", "η(B = 4)", "diverged at"):
        assert word in str(found)
    assert "no figure: it holds for plain SGD" in str(
        range_test(LOSS, PARAMS, DATA, optax.adam, learning_rates=RATES, batch_size=4, key=KEY)
    )
    assert "η(B" not in str(of_parabola())
    chex.assert_trees_all_equal(jax.jit(lambda x: x)(found), found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rates": [0.1]}, "learning_rates: expected 2 or more"),
        ({"learning_rates": 0.1}, "learning_rates: expected 2 or more"),
        ({"learning_rates": [0.2, 0.1]}, "ascending"),
        ({"learning_rates": [0.1, 0.1]}, "ascending"),
        ({"learning_rates": [0.1, 0.1 + 1e-12]}, "ascending order, .* in float32"),
        ({"learning_rates": [0.0, 0.1]}, "positive"),
        ({"learning_rates": [-1.0, 0.1]}, "positive"),
        ({"learning_rates": [0.1, np.nan]}, "positive"),
        ({"learning_rates": [0.1, np.inf]}, "finite"),
        ({"learning_rates": [0.1, 1e300]}, "finite numbers in float32"),
        ({"batch_size": 21}, "batch_size: expected 1 to 20"),
        ({"batch_size": 0}, "batch_size: expected 1 to 20"),
        ({"steps_per_rate": 0}, "steps_per_rate: expected 1"),
        ({"smoothing": 1.0}, "smoothing: expected"),
        ({"start": training.init_state(PARAMS, optax.adam(0.1))}, "start: its opt_state belongs to another"),
    ],
)
def test_bad_input(options, words):
    options = {"start": PARAMS, "learning_rates": RATES, "batch_size": 4, **options}
    with pytest.raises(ValueError, match=words):
        range_test(LOSS, data=DATA, make_optimizer=optax.sgd, key=KEY, **options)


def test_without_positive_curvature_no_rate_follows():
    with pytest.raises(ValueError, match="no rate follows"):
        range_test(
            lambda p, b: -jnp.mean(p**2) * b.mean(),
            jnp.ones(3),
            ONES,
            optax.sgd,
            learning_rates=RATES,
            batch_size=None,
            key=KEY,
        )
