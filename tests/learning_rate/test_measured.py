import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import curvature, data, learning_rate, losses, nn

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


DIAGONAL = jnp.diag(jnp.sqrt(3 * jnp.array([5.0, 2.0, 1.0])))  # Hessian diag(5, 2, 1)
OF_DIAGONAL = functools.partial(
    learning_rate.measure_stability, quadratic, jnp.ones(3), DIAGONAL, rates=0.4 * LADDER, key=KEY, num_steps=2
)
AS_SGD = {
    "every second step": lambda rate: optax.MultiSteps(optax.sgd(rate), 2),
    "every fourth": lambda rate: optax.MultiSteps(optax.sgd(rate), 4).gradient_transformation(),
    "at most that rate": optax.polyak_sgd,
    "reduced after ten": lambda rate: optax.chain(optax.sgd(rate), optax.contrib.reduce_on_plateau()),
    "reduced after five": lambda rate: optax.chain(
        optax.sgd(rate), optax.contrib.reduce_on_plateau(factor=0.5, patience=5)
    ),
    "of its own curvature": lambda rate: learning_rate.sharpness_sgd(key=KEY, fraction=5 * rate, momentum=0.0),
    "named in its state": optax.inject_hyperparams(optax.sgd),
}


@pytest.mark.parametrize("name", AS_SGD)
def test_an_optimizer_that_moves_as_sgd_has_its_limit(name):
    """By its moves the distance along the sharpest direction is multiplied by 1 − 5η: 2/5."""
    np.testing.assert_allclose(OF_DIAGONAL(AS_SGD[name]).limits, 0.4, rtol=5e-3)


def test_a_rate_in_a_state_that_is_given_is_the_ladders():
    make = optax.inject_hyperparams(optax.sgd)
    found = OF_DIAGONAL(make, opt_state=make(learning_rate=1e-3).init(jnp.ones(3)))
    np.testing.assert_allclose(found.limits, 0.4, rtol=5e-3)


@pytest.mark.parametrize(
    "make",
    [
        optax.adam,
        optax.lion,
        optax.sign_sgd,
        optax.lbfgs,
        lambda rate: optax.sgd(0.1),
        lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate)),
        lambda rate: optax.noisy_sgd(rate, key=0),
        lambda rate: optax.chain(optax.normalize_by_update_norm(), optax.sgd(rate)),
    ],
)
def test_what_is_not_linear_near_a_fixed_point_is_refused(make):
    with pytest.raises(TypeError, match=r"make_optimizer: .* not linear in the gradient and in the rate"):
        OF_DIAGONAL(make)


def test_what_never_moves_is_refused():
    with pytest.raises(TypeError, match="none of its first 100 updates"):
        OF_DIAGONAL(lambda rate: optax.set_to_zero())


def test_what_follows_no_recursion_has_no_limit():
    """Rates that go up and down by a factor of 30."""
    uneven = lambda rate: optax.sgd(lambda count: rate * jnp.where(count % 3 == 0, 1.0, 0.03))
    assert np.isnan(OF_DIAGONAL(uneven).limits).all()


def test_momentum_on_a_network_is_measured_at_its_own_limit():
    inputs, labels = jax.tree.map(lambda x: x[:200], data.digits())
    model = nn.mlp([16, 10])
    params = model.init(KEY, (64,))
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    make = functools.partial(optax.sgd, momentum=0.9)
    limit = 3.8 / curvature.sharpness(loss, params, (inputs, labels), key=KEY).value
    found = learning_rate.measure_stability(loss, params, (inputs, labels), make, rates=limit * LADDER, key=KEY)
    np.testing.assert_allclose(found.limits, limit, rtol=0.02)


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
