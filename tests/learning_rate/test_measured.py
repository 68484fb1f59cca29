import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import data, learning_rate, losses, nn

KEY = jax.random.key(0)
LADDER = 2.0 ** np.arange(-1.5, 2.01, 0.25)


def quadratic(params, batch):
    return jnp.mean(0.5 * (batch @ params) ** 2)


def test_on_a_quadratic_both_limits_are_two_over_lambda():
    batch = jnp.diag(jnp.sqrt(jnp.array([5.0, 4.0, 1.0, 0.1]) * 4))  # Hessian diag(5, 4, 1, .1)
    ladder = learning_rate.measure_stability(quadratic, jnp.ones(4), batch, optax.sgd, rates=0.4 * LADDER, key=KEY)
    np.testing.assert_allclose(ladder.limits, 0.4, rtol=5e-3)
    assert ladder.limit_error < 2e-3
    # Plainly it fails beyond the same limit, within the ladder's spacing.
    assert ladder.plain_bracket[0] <= 0.4 * (1 + 1e-6)
    assert 0.4 < ladder.plain_bracket[1] < 0.4 * 2**0.26


def test_a_network_with_negative_curvature_is_measured_at_its_sharpness():
    inputs, labels = jax.tree.map(lambda x: x[:200], data.digits())
    model = nn.mlp([16, 10])
    params = model.init(KEY, (64,))
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params))
        batch64 = (jnp.asarray(inputs, jnp.float64), labels)
        values = np.linalg.eigvalsh(jax.jit(jax.hessian(lambda w: loss(unravel(w), batch64)))(flat))
    assert values[0] < -0.3 * values[-1]
    ladder = learning_rate.measure_stability(
        loss, params, (inputs, labels), optax.sgd, rates=2 / values[-1] * LADDER, key=KEY
    )
    np.testing.assert_allclose(ladder.limit, 2 / values[-1], rtol=0.03)
    assert ladder.growth.shape == (3, len(LADDER))


@pytest.mark.parametrize(
    ("make_optimizer", "predicted"),
    [
        (functools.partial(optax.sgd, momentum=0.9), 3.8 / 5),
        (functools.partial(optax.sgd, momentum=0.9, nesterov=True), 3.8 / 2.8 / 5),
    ],
)
def test_momentum_loses_stability_at_its_own_limit(make_optimizer, predicted, x64):
    """(2 + 2β)/λ and (2 + 2β)/((1 + 2β)λ), whether or not the ladder has a rung there."""
    batch = jnp.diag(jnp.sqrt(jnp.array([5.0, 3.0, 1.0, 0.1]) * 4))
    for shift in (1.0, 1.04):
        rates = predicted * shift * np.linspace(0.9, 1.1, 15)
        ladder = learning_rate.measure_stability(quadratic, jnp.ones(4), batch, make_optimizer, rates=rates, key=KEY)
        np.testing.assert_allclose(ladder.limits, predicted, rtol=1e-3)


def test_adam_in_a_state_that_it_is_given(x64):
    """38/λ of P^-½ H P^-½ at β₁ = .9, with P = √ν while ν stands still; λ = 5/2 for P = 2."""
    batch = jnp.diag(jnp.sqrt(jnp.array([5.0, 3.0, 1.0, 0.1]) * 4))
    make_adam = functools.partial(optax.adam, eps=0.0)
    state = optax.tree.set(make_adam(1.0).init(jnp.ones(4)), count=jnp.int32(10**6), nu=jnp.full(4, 4.0))
    ladder = learning_rate.measure_stability(
        quadratic,
        jnp.ones(4),
        batch,
        make_adam,
        rates=38 / 2.5 * np.linspace(0.85, 1.2, 15),
        key=KEY,
        opt_state=state,
    )
    # Over a dozen steps ν loses 1 %.
    np.testing.assert_allclose(ladder.limits, 38 / 2.5, rtol=0.01)


def test_another_optimizer_and_other_rates_trace_the_network_no_more():
    traced = []

    def loss(params, batch):
        traced.append(params)
        return quadratic(params, batch)

    measure = lambda rates, make: learning_rate.measure_stability(
        loss, jnp.ones(4), jnp.eye(4), make, rates=rates, key=KEY, num_steps=2
    )
    measure([1.0, 2.0, 9.0], optax.sgd)
    once = len(traced)
    assert once <= 2  # its shape is asked for, and its gradient compiled
    measure([1.0, 3.0, 8.0, 9.0], functools.partial(optax.sgd, momentum=0.9))
    assert len(traced) <= once + 1


def test_a_ladder_that_does_not_hold_the_limit_says_nan():
    batch = jnp.eye(4)
    ladder = learning_rate.measure_stability(quadratic, jnp.ones(4), batch, optax.sgd, rates=[0.1, 0.2, 0.3], key=KEY)
    assert np.isnan(ladder.limits).all()
    np.testing.assert_allclose(ladder.plain_bracket[0], 0.3)
    assert np.isnan(ladder.plain_bracket[1])


def test_half_precision_is_refused():
    with pytest.raises(TypeError, match="float32 or float64"):
        learning_rate.measure_stability(
            quadratic, jnp.ones(4, jnp.bfloat16), jnp.eye(4), optax.sgd, rates=[0.1, 0.2, 0.3], key=KEY
        )


@pytest.mark.parametrize("rates", [[0.1, 0.2], [0.2, 0.1, 0.3], [0.0, 0.1, 0.2], [0.1, 0.2, float("inf")], 0.1])
def test_bad_ladders(rates):
    with pytest.raises(ValueError, match="rates: expected"):
        learning_rate.measure_stability(quadratic, jnp.ones(4), jnp.eye(4), optax.sgd, rates=rates, key=KEY)
