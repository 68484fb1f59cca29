import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import data, losses, nn
from jaxnet.learning_rate._mean_square import sgd_stability
from jaxnet.learning_rate._population import measure_sgd_stability, one_by_one

KEY = jax.random.key(0)


def line(params, batch):
    """½ mean h_n (w − t_n)²: one param, with noise."""
    h, t = batch
    return jnp.mean(0.5 * h * (params - t) ** 2)


BATCH = (jnp.array([1.0, 4.0]), jnp.array([0.0, 1.0]))


def test_the_two_limits_of_one_param_in_closed_form(x64):
    """h = 1 or 4: E(1 − ηh)² = 1 at η = 2·2.5/8.5; E log|1 − ηh| = 0 where (η − 1)(4η − 1) = 1, at η = 5/4."""
    measure = lambda **options: measure_sgd_stability(line, jnp.array(3.0), BATCH, 1, highest=2.0, key=KEY, **options)
    np.testing.assert_allclose(measure().limit, 5 / 8.5, rtol=5e-3)
    single = measure(follow=one_by_one)
    np.testing.assert_allclose(single.limit, 5 / 4, rtol=1e-2)
    assert single.limits.shape == (3,)
    assert single.rates.shape == single.growth.shape == (11, 3)
    assert 0 < single.limit_error < 0.02


def test_without_replacement_the_whole_set_is_gradient_descent(x64):
    found = measure_sgd_stability(line, jnp.array(3.0), BATCH, 2, highest=2.0, key=KEY, replace=False, num_particles=8)
    np.testing.assert_allclose(found.limits, 2 / 2.5, rtol=2e-3)


def test_runs_are_split_where_directions_grow_unlike(x64):
    """On two Gaussians the mean over runs that are all followed alike would come out 3.5 % too high."""
    neuron = nn.linear_neuron()
    loss, batch = losses.mean_loss(neuron.apply, losses.squared_error), data.two_gaussians_exact(20)
    params = neuron.init(KEY, (2,))
    predicted = sgd_stability(loss, params, batch, 4, replace=True)
    measured = measure_sgd_stability(loss, params, batch, 4, highest=3.0, key=KEY, num_steps=200)
    np.testing.assert_allclose(measured.limit, predicted, rtol=0.01)


def test_a_network_on_its_own_outputs_fails_where_gauss_newton_says(x64):
    """From gradients of a nonlinear network alone, beside a limit that comes from its Jacobians."""
    model = nn.mlp([4, 2], activation=jnp.tanh)
    params = model.init(KEY, (3,))
    inputs = jax.random.normal(jax.random.key(1), (10, 3))
    loss, batch = losses.mean_loss(model.apply, losses.squared_error), (inputs, model.apply(params, inputs))
    predicted = float(sgd_stability(loss, params, batch, 2, replace=False, gauss_newton=True))
    measured = measure_sgd_stability(
        loss, params, batch, 2, highest=3 * predicted, key=KEY, replace=False, num_particles=256, num_steps=200
    )
    np.testing.assert_allclose(measured.limit, predicted, rtol=0.02)


def test_bad_input():
    with pytest.raises(ValueError, match="batch_size: expected 1 to 2"):
        measure_sgd_stability(line, jnp.array(3.0), BATCH, 3, highest=2.0, key=KEY)
    with pytest.raises(ValueError, match="highest: expected a positive and finite rate"):
        measure_sgd_stability(line, jnp.array(3.0), BATCH, 1, highest=0.0, key=KEY)
