import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import curvature, data, learning_rate, losses, nn, per_example

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
    rates = [float(found.rate(b)) for b in (1, 4, 16, 64, 300, None)]
    assert rates == sorted(rates)
    assert rates[-1] == float(found.optimal)
    np.testing.assert_allclose(rates[1] / rates[0], 4, rtol=0.3)


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
