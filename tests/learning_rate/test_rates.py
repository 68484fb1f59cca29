import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import learning_rate, losses, nn, training


def quadratic(params, batch):
    """Mean over examples of ½ (w − c_n)′ A (w − c_n), A diagonal."""
    return jnp.mean(0.5 * ((params - batch) ** 2 @ jnp.array([4.0, 1.0, 0.5])))


BATCH = jnp.asarray(np.random.default_rng(0).normal(size=(30, 3)))


def test_optimal():
    assert learning_rate.optimal(4.0) == 0.25
    np.testing.assert_allclose(learning_rate.optimal(0.84, 0.04), 2 / 0.88)
    assert learning_rate.optimal(0.0) == jnp.inf
    assert jnp.isnan(learning_rate.optimal(-1.0))
    np.testing.assert_allclose(learning_rate.optimal(jnp.array([1, 2])), [1, 0.5])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_maximal_is_where_optax_loses_stability(momentum, nesterov):
    """Spectral radius of one optax step on ½λw², just below and above the limit."""
    value = 3.0
    limit = float(learning_rate.maximal(value, momentum=momentum, nesterov=nesterov))

    def radius(rate):
        optimizer = optax.sgd(rate, momentum=momentum, nesterov=nesterov)
        update = training.make_update(lambda w, b: 0.5 * value * w**2, optimizer)
        flat, unravel = ravel_pytree(training.init_state(jnp.float64(1.0), optimizer)[:2])

        def step(x):
            params, opt_state = unravel(x)
            state, _ = update(training.TrainState(params, opt_state, jnp.zeros((), jnp.int32)), None)
            return ravel_pytree((state.params, state.opt_state))[0]

        return np.abs(np.linalg.eigvals(jax.jacobian(step)(flat))).max()

    with jax.enable_x64(True):
        assert radius(limit * 0.999999) < 1 < radius(limit * 1.000001)


def test_momentum_out_of_range():
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match="momentum"):
            learning_rate.maximal(1.0, momentum=momentum)


def test_greedy_minimises_along_the_gradient(x64):
    params = jnp.array([1.0, -2.0, 0.5])
    gradient = jax.grad(quadratic)(params, BATCH)
    along = lambda rate: quadratic(params - rate * gradient, BATCH)
    rate = learning_rate.greedy(quadratic, params, BATCH)
    np.testing.assert_allclose(jax.grad(along)(rate), 0, atol=1e-10)
    assert jnp.isnan(learning_rate.greedy(lambda p, b: -quadratic(p, b), params, BATCH))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_greedy_of_half_precision_is_that_of_its_numbers(dtype):
    model = nn.mlp([5, 3], activation=jnp.tanh)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    halved = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    inputs = halved(jax.random.normal(jax.random.key(1), (8, 4)))
    given = halved(model.init(jax.random.key(0), (4,))), (inputs, jnp.arange(8) % 3)
    widened = lambda x: x.astype(jnp.float32) if x.dtype == dtype else x
    expected = learning_rate.greedy(loss, *jax.tree.map(widened, given))
    np.testing.assert_allclose(learning_rate.greedy(loss, *given), expected, rtol=1e-5)


def test_the_curvature_of_noise_is_the_trace_of_its_product(x64):
    params, curvatures = jnp.array([1.0, -2.0, 0.5]), np.array([4.0, 1.0, 0.5])
    found = learning_rate.noisy_curvature(quadratic, params, BATCH, key=jax.random.key(0), num_probes=4000)
    rows = curvatures * (np.asarray(params) - np.asarray(BATCH))
    exact = np.trace(np.diag(curvatures) @ np.cov(rows.T))
    assert abs(found.along_noise - exact) < 4 * found.standard_error
    assert found.standard_error < 0.05 * exact
    mean = rows.mean(axis=0)
    np.testing.assert_allclose(found.gradient_squared, mean @ mean, rtol=1e-9)
    np.testing.assert_allclose(found.along_gradient, mean @ (curvatures * mean), rtol=1e-9)
    np.testing.assert_allclose(found.greedy, learning_rate.greedy(quadratic, params, BATCH), rtol=1e-9)


def test_the_rate_for_a_batch_size_is_best_for_one_step_on_a_quadratic(x64):
    """Minimise the expected loss after one step over 20 000 drawn batches, and find the formula's rate."""
    params = jnp.array([1.0, -2.0, 0.5])
    found = learning_rate.noisy_curvature(quadratic, params, BATCH, key=jax.random.key(0), num_probes=4000)
    for batch_size in (1, 4):
        rate = learning_rate.for_batch_size(found.greedy, found.noise_scale, batch_size)
        chosen = jax.random.randint(jax.random.key(batch_size), (20000, batch_size), 0, len(BATCH))
        gradients = jax.vmap(lambda i: jax.grad(quadratic)(params, BATCH[i]))(chosen)
        expected = lambda rate, g=gradients: jax.vmap(lambda gi: quadratic(params - rate * gi, BATCH))(g).mean()
        # E is quadratic in the rate: one Newton step from 0 is its minimum.
        best = -jax.grad(expected)(0.0) / jax.hessian(expected)(0.0)
        np.testing.assert_allclose(rate, best, rtol=0.05)


@pytest.mark.parametrize("signs", [(-1, -1), (1, -1), (-1, 1), (1, 1)])
def test_the_noise_scale_has_a_figure_where_both_curvatures_are_positive(signs, x64):
    """½(s₁ω₁² + s₂ω₂²) on data that scatter along ω₂ with variance v: g·Hg = s₁, tr(HΣ) = s₂v at ω = (1, 0)."""
    scatter = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    batch = jnp.stack([jnp.zeros(5), jnp.asarray(scatter)], axis=1)
    bent = lambda w, x: jnp.mean(0.5 * (signs[0] * (w[0] - x[:, 0]) ** 2 + signs[1] * (w[1] - x[:, 1]) ** 2))
    found = learning_rate.noisy_curvature(bent, jnp.array([1.0, 0.0]), batch, key=jax.random.key(0), num_probes=400)
    np.testing.assert_allclose(found.along_gradient, signs[0])
    error = found.standard_error
    assert abs(found.along_noise - signs[1] * scatter.var(ddof=1)) < 4 * error
    if min(signs) < 0:
        assert np.isnan([found.noise_scale, found.noise_scale_error]).all()
    else:
        np.testing.assert_allclose([found.noise_scale, found.noise_scale_error], [found.along_noise, error])


def test_for_batch_size_has_its_two_ends():
    rates = learning_rate.for_batch_size(2.0, 10.0, jnp.array([1, 10, 10**9]))
    np.testing.assert_allclose(rates, [2 / 11, 1.0, 2.0], rtol=1e-6)
    assert jnp.isnan(learning_rate.for_batch_size(2.0, -1.0, 4))
    finite = learning_rate.for_batch_size(2.0, 10.0, jnp.array([0, 1, 50, 100, 101]), num_examples=100)
    np.testing.assert_allclose(finite, [np.nan, 2 / 11, 2 / (1 + 10 * 50 / (50 * 99)), 2.0, np.nan], rtol=1e-6)


def test_one_example_shows_no_noise():
    with pytest.raises(ValueError, match="2 examples"):
        learning_rate.noisy_curvature(quadratic, jnp.ones(3), BATCH[:1], key=jax.random.key(0))
