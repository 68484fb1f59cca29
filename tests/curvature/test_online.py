import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import curvature

KEY = jax.random.key(8)
CURVATURES = jnp.array([2.0, -1.5, 0.5, 0.1, 0.0])


def loss(params, batch):
    """Examples scale a quadratic with the Hessian diag(CURVATURES) by factors of mean 1."""
    return 0.5 * jnp.mean(batch) * jnp.vdot(CURVATURES, params**2)


def follow(gamma, batches):
    estimate = curvature.online_sharpness(loss, gamma=gamma)
    params = jnp.arange(5.0)

    def step(psi, batch):
        return estimate.update(psi, params, batch)

    return np.asarray(jax.lax.scan(step, estimate.init(params, key=KEY), batches)[1])


def test_it_finds_the_largest_algebraic_eigenvalue():
    np.testing.assert_allclose(follow(0.1, jnp.ones((400, 3)))[-1], 2.0, rtol=1e-3)


def test_noise_of_the_batches_is_averaged_over_one_over_gamma_of_them():
    """Ψ is a running mean of factors with variance 1/B: its own variance is γ/(2 − γ) of that."""
    batches = 1 + 0.5 * jax.random.normal(KEY, (20000, 1))
    for gamma in (0.05, 0.2):
        values = follow(gamma, batches)[2000:]
        np.testing.assert_allclose(values.mean(), 2.0, rtol=0.02)
        np.testing.assert_allclose(values.std(), 2 * 0.5 * (gamma / (2 - gamma)) ** 0.5, rtol=0.15)


@pytest.mark.parametrize("wrong", [{"gamma": 0.0}, {"gamma": 1.5}, {"alpha": 0.0}, {"alpha": float("inf")}])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        curvature.online_sharpness(loss, **wrong)
