import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import data, losses, nn, training

KEY = jax.random.key(5)
MODEL = nn.mlp([8, 3])
LOSS = losses.mean_loss(MODEL.apply, losses.softmax_cross_entropy)
PARAMS = MODEL.init(KEY, (4,))


def problem(n=20):
    keys = jax.random.split(jax.random.key(7), 2)
    return jax.random.normal(keys[0], (n, 4)), jax.random.randint(keys[1], (n,), 0, 3)


DATA = problem()
fit = functools.partial(training.fit, LOSS, key=KEY)
run = functools.partial(fit, PARAMS, DATA, optax.sgd, learning_rate=0.1, num_epochs=3)


@pytest.mark.parametrize("batch_size", [1, 6, 20, None])
def test_fit_is_the_loop_written_out(batch_size):
    result = run(batch_size=batch_size)
    optimizer = optax.sgd(0.1)
    update, state = jax.jit(training.make_update(LOSS, optimizer)), training.init_state(PARAMS, optimizer)
    for epoch in range(3):
        values, sizes = [], []
        for batch in data.batches(DATA, batch_size or 20, key=KEY, epoch=epoch):
            state, metrics = update(state, batch)
            values.append(float(metrics["loss"]))
            sizes.append(len(batch[1]))
        np.testing.assert_allclose(result.history.step_loss[epoch], values, rtol=2e-5)
        np.testing.assert_allclose(result.history.loss[epoch], np.average(values, weights=sizes), rtol=2e-5)
    chex.assert_trees_all_close(result.state, state, rtol=1e-5, atol=1e-6)


def test_history_counts_epochs_and_iterations():
    history = run(batch_size=6).history
    assert history.epoch.tolist() == [1, 2, 3]
    assert history.step.tolist() == [4, 8, 12]
    assert history.step_loss.shape == (3, 4)


def test_a_second_fit_with_another_rate_key_and_data_traces_nothing():
    calls = []

    def loss(params, batch):
        calls.append(1)
        return LOSS(params, batch)

    call = functools.partial(training.fit, loss, make_optimizer=optax.sgd, batch_size=6, num_epochs=2)
    call(PARAMS, DATA, learning_rate=0.1, key=KEY)
    first = len(calls)
    other = jax.tree.map(lambda x: x[::-1], DATA)
    for rate in (0.2, np.float64(0.3), jnp.float32(0.4), 1):
        call(jax.tree.map(lambda x: x + 1, PARAMS), other, learning_rate=rate, key=jax.random.key(9))
    assert len(calls) == first > 0


@pytest.mark.parametrize("batch_size", [1, 8, None])
def test_a_resumed_run_is_the_same_run(batch_size):
    call = functools.partial(fit, data=DATA, make_optimizer=optax.adam, learning_rate=0.01, batch_size=batch_size)
    augment = lambda key, batch: (batch[0] + jax.random.normal(key, batch[0].shape), batch[1])
    whole = call(PARAMS, num_epochs=5, augment=augment)
    part = call(PARAMS, num_epochs=2, augment=augment)
    rest = call(part.state, num_epochs=3, augment=augment)
    chex.assert_trees_all_equal(rest.state, whole.state)
    np.testing.assert_array_equal(rest.history.epoch, whole.history.epoch[2:])
    np.testing.assert_array_equal(rest.history.step, whole.history.step[2:])
    np.testing.assert_array_equal(rest.history.loss, whole.history.loss[2:])


def test_a_stochastic_epoch_over_copies_is_many_epochs_bitwise():
    single = run(batch_size=1, order=data.cyclic, num_epochs=10)
    copies = fit(
        PARAMS,
        data.repeated(DATA, 10),
        optax.sgd,
        learning_rate=0.1,
        batch_size=1,
        num_epochs=1,
        order=data.cyclic,
    )
    chex.assert_trees_all_equal(single.state.params, copies.state.params)


def test_observers_see_every_epoch_of_the_same_run():
    seen = []
    watched = run(batch_size=6, observers=[lambda p: seen.append((p.epoch, p.num_epochs, len(p.history.loss)))])
    assert seen == [(1, 3, 1), (2, 3, 2), (3, 3, 3)]
    chex.assert_trees_all_equal(watched.state, run(batch_size=6).state)
    chex.assert_trees_all_equal(watched.history, run(batch_size=6).history)


def test_metrics_and_validation_are_taken_at_the_epochs_end():
    held_out = jax.tree.map(lambda x: x[:7], problem(30))
    accuracy = functools.partial(losses.accuracy, MODEL.apply)
    result = run(batch_size=6, validation=held_out, metrics={"accuracy": accuracy, "loss": LOSS})
    params = result.state.params
    np.testing.assert_allclose(result.history.metrics["loss"][-1], LOSS(params, DATA), rtol=1e-6)
    np.testing.assert_allclose(result.history.metrics["accuracy"][-1], accuracy(params, DATA))
    np.testing.assert_allclose(result.history.validation["loss"][-1], LOSS(params, held_out), rtol=1e-6)
    np.testing.assert_allclose(result.history.validation["accuracy"][-1], accuracy(params, held_out))


def test_early_stopping_keeps_the_minimum():
    held_out = problem(9)[0], jnp.array([2, 1, 0] * 3)  # labels of chance: its loss turns up soon
    long = fit(PARAMS, DATA, optax.sgd, learning_rate=0.5, batch_size=1, num_epochs=60, validation=held_out)
    stop = training.StopRule(patience=5)
    early = fit(
        PARAMS,
        DATA,
        optax.sgd,
        learning_rate=0.5,
        batch_size=1,
        num_epochs=60,
        validation=held_out,
        stop=stop,
    )
    curve = long.history.validation["loss"]
    assert early.stopped.reason == "patience"
    assert early.stopped.epoch == early.best.epoch + 5 < 60
    np.testing.assert_allclose(early.best.loss, curve[: early.stopped.epoch].min(), rtol=1e-6)
    np.testing.assert_allclose(LOSS(early.best.params, held_out), early.best.loss, rtol=1e-5)


def test_the_stop_rule_says_which_end_it_was():
    small = run(batch_size=None, num_epochs=200, stop=training.StopRule(loss_below=0.9))
    assert small.stopped.reason == "loss_below"
    assert small.history.loss[-1] < 0.9 <= small.history.loss[-2]
    assert small.stopped.step == len(small.history.loss)
    assert "small enough" in str(small.stopped)
    assert run(batch_size=None).stopped == ("num_epochs", 3, 3)


def parabola(params, batch):
    return jnp.mean(batch[0] * params**2)


def test_a_run_that_diverges_says_at_which_step_and_keeps_its_history():
    # w grows by 1 − 2η = −1e6 a step; its square leaves float32 when |w| passes √3.4e38.
    batch = (jnp.ones(4),)
    result = training.fit(
        parabola, jnp.float32(1.0), batch, optax.sgd, learning_rate=5e5, batch_size=2, num_epochs=50, key=KEY
    )
    expected = int(np.ceil(np.log(3.4e38) / np.log(1e12))) + 1
    assert result.stopped.reason == "diverged"
    assert result.stopped.step == expected
    assert result.stopped.epoch == -(-expected // 2) == len(result.history.loss)
    assert np.isfinite(result.history.step_loss.ravel()[: expected - 1]).all()
    assert f"step {expected}" in str(result.stopped)


def test_a_divergence_in_the_very_last_step_is_told_too():
    batch = (jnp.full(4, 1e30),)
    result = training.fit(
        parabola, jnp.float32(1.0), batch, optax.sgd, learning_rate=1e30, batch_size=None, num_epochs=1, key=KEY
    )
    assert np.isfinite(result.history.step_loss).all()
    assert result.stopped == ("diverged", 1, 1)


def test_half_precision_averages_its_epoch_in_single():
    loss = lambda p, b: 100 + 0 * p * b.mean().astype(p.dtype)
    result = training.fit(
        loss, jnp.float16(1.0), jnp.ones(3000), optax.sgd, learning_rate=0.1, batch_size=7, num_epochs=1, key=KEY
    )
    np.testing.assert_allclose(result.history.loss, 100, rtol=1e-4)


def test_an_order_is_kept_for_batches_of_all_examples():
    drawn = run(batch_size=20, order=data.independent, num_epochs=1)
    rows = data.independent(KEY, 0, 20)
    expected = jax.grad(LOSS)(PARAMS, jax.tree.map(lambda x: x[rows], DATA))
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, expected)
    chex.assert_trees_all_close(drawn.state.params, moved, rtol=1e-5, atol=1e-6)


def test_best_goes_by_the_loss_whatever_a_metric_is_called():
    result = run(batch_size=6, validation=DATA, metrics={"loss": lambda p, b: jnp.float32(7.0)})
    np.testing.assert_allclose(result.best.loss, result.history.validation["loss"].min())
    np.testing.assert_allclose(result.history.validation["loss"][-1], LOSS(result.state.params, DATA), rtol=1e-6)


def test_a_state_that_does_not_fit_the_run_is_refused():
    state = run(batch_size=6, num_epochs=1).state
    with pytest.raises(ValueError, match="step 4 is not at the end of an epoch of 20 steps"):
        fit(state, DATA, optax.sgd, learning_rate=0.1, batch_size=1, num_epochs=1)
    with pytest.raises(ValueError, match="another optimizer"):
        fit(state, DATA, optax.adam, learning_rate=0.1, batch_size=6, num_epochs=1)


def test_dropout_through_augment_is_random_and_reproducible():
    model = nn.serial(nn.dense(16), nn.dropout(0.5), nn.dense(3))
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    params = model.init(KEY, (4,))
    call = lambda **k: training.fit(
        loss, params, DATA, optax.sgd, learning_rate=0.1, batch_size=5, num_epochs=2, key=KEY, **k
    )
    a, b = call(augment=data.with_keys), call(augment=data.with_keys)
    chex.assert_trees_all_equal(a.state, b.state)
    assert abs(a.history.loss[-1] - call().history.loss[-1]) > 1e-4


def test_a_schedule_is_followed():
    schedule = optax.linear_schedule(0.1, 0.0, 12)
    scheduled = run(batch_size=5, learning_rate=schedule)
    update, state = (
        training.make_update(LOSS, optax.sgd(schedule)),
        training.init_state(PARAMS, optax.sgd(schedule)),
    )
    for epoch in range(3):
        for batch in data.batches(DATA, 5, key=KEY, epoch=epoch):
            state, _ = update(state, batch)
    chex.assert_trees_all_close(scheduled.state.params, state.params, rtol=1e-5)


def test_sweep_is_fit_at_each_rate():
    rates = [0.01, 0.1, 0.5]
    swept = training.sweep(
        LOSS,
        PARAMS,
        DATA,
        optax.adam,
        learning_rates=rates,
        batch_size=6,
        num_epochs=3,
        key=KEY,
        validation=DATA,
    )
    for rate, one in zip(rates, swept, strict=True):
        alone = fit(PARAMS, DATA, optax.adam, learning_rate=rate, batch_size=6, num_epochs=3, validation=DATA)
        chex.assert_trees_all_close(one.state, alone.state, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.history.step_loss, alone.history.step_loss, rtol=1e-4)
        np.testing.assert_allclose(one.best.loss, alone.best.loss, rtol=1e-4)
    keyed = training.sweep(
        LOSS, PARAMS, DATA, optax.sgd, learning_rates=[0.1, 0.1], batch_size=6, num_epochs=3,
        keys=jnp.stack([KEY, jax.random.key(1)]),
    )  # fmt: skip
    np.testing.assert_allclose(keyed[0].history.loss, run(batch_size=6).history.loss, rtol=1e-5)
    assert abs(keyed[1].history.loss - keyed[0].history.loss).max() > 1e-5


def test_a_run_of_a_sweep_diverges_by_itself():
    swept = training.sweep(
        parabola,
        jnp.float32(1.0),
        (jnp.ones(4),),
        optax.sgd,
        learning_rates=[0.1, 1e6],
        batch_size=None,
        num_epochs=20,
        key=KEY,
    )
    assert [one.stopped.reason for one in swept] == ["num_epochs", "diverged"]
    assert len(swept[1].history.loss) < len(swept[0].history.loss) == 20


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batch_size": 21}, ValueError, "batch_size: expected 1 to 20"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"num_epochs": 0}, ValueError, "num_epochs"),
        ({"num_epochs": 2.5}, ValueError, "num_epochs"),
        ({"batch_size": 2.5}, ValueError, "batch_size"),
        ({"learning_rate": 1e39}, ValueError, "positive and finite in float32"),
        ({"learning_rate": 1e-60}, ValueError, "positive and finite in float32"),
        ({"learning_rate": 0.0}, ValueError, "positive and finite"),
        ({"learning_rate": -1}, ValueError, "positive and finite"),
        ({"learning_rate": float("nan")}, ValueError, "positive and finite"),
        ({"learning_rate": float("inf")}, ValueError, "positive and finite"),
        ({"learning_rate": [0.1, 0.2]}, ValueError, "sweep"),
        ({"stop": training.StopRule(patience=3)}, ValueError, "pass validation data"),
        ({"stop": training.StopRule(patience=0)}, ValueError, "patience from 1"),
    ],
)
def test_bad_arguments(change, error, words):
    with pytest.raises(error, match=words):
        run(**{"batch_size": 5, **change})


def test_a_finished_optimizer_is_refused_with_the_mend():
    with pytest.raises(TypeError, match=r"pass optax.sgd, not optax.sgd\(0.1\)"):
        fit(PARAMS, DATA, optax.sgd(0.1), learning_rate=0.1, batch_size=5, num_epochs=1)


def test_sweep_wants_one_kind_of_key():
    call = functools.partial(training.sweep, LOSS, PARAMS, DATA, optax.sgd, batch_size=5, num_epochs=1)
    with pytest.raises(ValueError, match="either key"):
        call(learning_rates=[0.1])
    with pytest.raises(ValueError, match="one axis"):
        call(learning_rates=0.1, key=KEY)
    with pytest.raises(ValueError, match="positive and finite"):
        call(learning_rates=[], key=KEY)
    with pytest.raises(TypeError, match="schedule is for fit"):
        call(learning_rates=optax.constant_schedule(0.1), key=KEY)
    with pytest.raises(TypeError, match="got a TrainState"):
        training.sweep(
            LOSS, training.init_state(PARAMS, optax.sgd(0.1)), DATA, optax.sgd, learning_rates=[0.1], batch_size=5,
            num_epochs=1, key=KEY,
        )  # fmt: skip
