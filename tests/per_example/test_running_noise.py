import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import data, losses, nn, per_example, training

KEY = jax.random.key(0)


def linear(params, batch):
    """Its examples' gradients are the rows of the batch."""
    return jnp.mean(batch["rows"] @ params["w"])


def run(key, optimizer, steps, size):
    """The state after so many micro-batches of rows from a normal with tr Σ = 5 and |G|² = 5/4."""

    def step(state, key):
        rows = 0.5 + jax.random.normal(key, (size, 5))
        grads = jax.grad(linear)(params, {"rows": rows})
        return optimizer.update(grads, state, params)[1], None

    params = {"w": jnp.zeros(5), "none": None}
    return jax.lax.scan(step, optimizer.init(params), jax.random.split(key, steps))[0]


def test_the_averages_are_unbiased_and_their_error_is_the_spread():
    """Known S = 5 and |G|² = 1.25; 4 micro-batches of 3 an update, 150 updates, 300 runs."""
    optimizer = per_example.with_noise_scale(optax.sgd(0.1), 4, micro_batch_size=3, decay=0.98)
    one = lambda key: per_example.running_noise_scale(run(key, optimizer, 600, 3))
    found = jax.jit(jax.vmap(one))(jax.random.split(KEY, 300))
    for values, truth in ((found.trace, 5.0), (found.gradient_squared, 1.25)):
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / 300**0.5
    np.testing.assert_allclose(jnp.median(found.value), 4.0, rtol=0.03)
    np.testing.assert_allclose(jnp.median(found.standard_error), found.value.std(), rtol=0.2)
    # What |ḡ|² of 12 examples is, on average: |G|² + S/12.
    np.testing.assert_allclose(found.mean_squared.mean(), 1.25 + 5 / 12, rtol=0.02)
    assert bool(found.resolved.all())


def test_it_steps_as_multi_steps_and_sees_the_two_batch_sizes_of_the_paper(x64):
    optimizer = per_example.with_noise_scale(optax.adam(0.1), 2, micro_batch_size=4, decay=0.0)
    plain = optax.MultiSteps(optax.adam(0.1), 2)
    params = {"w": jnp.ones(3)}
    state, expected = optimizer.init(params), plain.init(params)
    first, second = jax.random.normal(KEY, (2, 3))
    for g in (first, second):
        updates, state = optimizer.update({"w": g}, state, params)
        same, expected = plain.update({"w": g}, expected, params)
        np.testing.assert_array_equal(updates["w"], same["w"])
    found, small, big = per_example.running_noise_scale((state,)), 4, 8
    small_squared, big_squared = (jnp.sum(first**2) + jnp.sum(second**2)) / 2, jnp.sum(((first + second) / 2) ** 2)
    np.testing.assert_allclose(found.trace, (small_squared - big_squared) / (1 / small - 1 / big), rtol=1e-6)
    squared = (big * big_squared - small * small_squared) / (big - small)
    np.testing.assert_allclose(found.gradient_squared, squared, rtol=1e-6)
    assert np.isnan(found.standard_error)  # of one update no spread is seen


def test_gradients_that_are_alike_do_not_cancel():
    optimizer = per_example.with_noise_scale(optax.sgd(0.1), 8, micro_batch_size=2, decay=0.0)
    grads = np.asarray(1000 + 0.05 * jax.random.normal(KEY, (8, 3)))
    state = optimizer.init(jnp.zeros(3))
    for g in grads:
        _, state = optimizer.update(jnp.asarray(g), state)
    exact = 2 * grads.astype(np.float64).var(axis=0, ddof=1).sum()
    np.testing.assert_allclose(per_example.running_noise_scale(state).trace, exact, rtol=1e-2)


def test_a_step_that_is_not_finite_is_left_out():
    optimizer = per_example.with_noise_scale(optax.sgd(0.1), 2, micro_batch_size=4, decay=0.5)
    state = optimizer.init(jnp.zeros(3))
    for scale in (1.0, 2.0):
        _, state = optimizer.update(jnp.full(3, scale), state)
    before = per_example.running_noise_scale(state)
    for scale in (1.0, jnp.nan):
        _, state = optimizer.update(jnp.full(3, scale), state)
    assert float(per_example.running_noise_scale(state).trace) == float(before.trace)


def test_fit_tells_it_and_half_precision_is_summed_in_more():
    model = nn.dense(2)
    batch = data.two_gaussians(key=KEY)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(KEY, (2,)))
    loss = losses.mean_loss(lambda p, x: model.apply(p, x.astype(jnp.bfloat16)), losses.softmax_cross_entropy)
    make = lambda rate: per_example.with_noise_scale(optax.sgd(rate), 2, micro_batch_size=10)
    batch = batch[0], (batch[1] > 0).astype(jnp.int32)
    seen = []
    training.fit(
        loss, params, batch, make, learning_rate=0.1, batch_size=10, num_epochs=2, key=KEY,
        observers=[lambda progress: seen.append(per_example.running_noise_scale(progress.state.opt_state))],
    )  # fmt: skip
    assert len(seen) == 2
    assert seen[1].trace.dtype == jnp.float32
    assert float(seen[1].trace) > 0


def test_an_average_of_per_example_estimates():
    """Of single examples' gradients in each step: S = 5, |G|² = 1.25."""

    def step(average, key):
        found = per_example.noise_scale(linear, {"w": jnp.zeros(5)}, {"rows": 0.5 + jax.random.normal(key, (16, 5))})
        return average.add(found.trace, found.mean_squared, 16), None

    found = jax.lax.scan(step, per_example.noise_average(0.99), jax.random.split(KEY, 400))[0].noise_scale
    assert abs(float(found.value) - 4) < 4 * float(found.standard_error)
    assert float(found.standard_error) < 0.4


@pytest.mark.parametrize(("every_k", "size", "decay"), [(1, 4, 0.9), (2, 0, 0.9), (2, 4, 1.0), (2, 4, -0.1)])
def test_numbers_out_of_range_are_refused(every_k, size, decay):
    with pytest.raises(ValueError, match="expected"):
        per_example.with_noise_scale(optax.sgd(0.1), every_k, micro_batch_size=size, decay=decay)


def test_a_state_without_it_is_refused():
    with pytest.raises(ValueError, match="found 0"):
        per_example.running_noise_scale(optax.sgd(0.1).init(jnp.zeros(2)))
