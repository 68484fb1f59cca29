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


def test_in_one_dimension_the_limit_for_a_batch_is_exact():
    """E_n = ½ x_n² (w − 1)²: E(1 − ηh_B)² = 1 at η = 2λ/(λ² + p Var h), by sums over all batches of two."""
    x = jnp.array([1.0, 2.0, 0.5, 1.5])
    loss = lambda w, batch: jnp.mean(0.5 * batch**2 * (w - 1) ** 2)
    found = learning_rate.analyse(loss, jnp.array(3.0), x, key=KEY)
    h = np.asarray(x) ** 2
    pairs = [(h[i] + h[j]) / 2 for i in range(4) for j in range(i)]
    for size, curvatures in ((1, h), (2, pairs), (4, [h.mean()])):
        growth = np.mean((1 - float(found.limit(size)) * np.array(curvatures)) ** 2)
        np.testing.assert_allclose(growth, 1, rtol=1e-5)
    np.testing.assert_allclose(found.limit(None), 2 / h.mean(), rtol=1e-5)


def test_no_batch_bears_more_than_its_limit(x64):
    """The exact limit of SGD on a quadratic is below that of its sharpest direction alone."""
    neuron = nn.linear_neuron()
    loss = losses.mean_loss(neuron.apply, losses.squared_error)
    batch = data.two_gaussians_exact()
    params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
    found = learning_rate.analyse(loss, params, batch, key=KEY, tol=1e-8)
    sizes = found.batch_sizes
    assert sizes == (1, 2, 4, 8, 16, 32, 64, 100)
    exact = learning_rate.sgd_stability(loss, params, batch, sizes, replace=False)
    limits = np.array([found.limit(size) for size in sizes])
    assert (exact <= limits * (1 + 1e-6)).all()
    assert exact[0] < 0.8 * limits[0]
    np.testing.assert_allclose(exact[-1], limits[-1], rtol=1e-6)


def test_is_my_rate_stable(analysed):
    found = analysed[-1]
    low, high = float(found.safe_maximal), float(found.maximal)
    assert found.is_stable(0.99 * low) == "yes"
    assert found.is_stable(1.01 * high) == "no"
    assert found.is_stable((low + high) / 2) == "not resolved"
    assert found.is_stable(0.99 * float(found.limit(4)), 4) == "not resolved"
    assert found.is_stable(0.99 * low, 300) == "yes"
    assert found.is_stable(1.01 * float(found.limit(1)), 1) == "no"
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rate: expected positive and finite"):
            found.is_stable(rate)


def test_it_says_why(analysed):
    found = analysed[-1]
    assert found.to_dict()["rates"]["reason"].startswith(f"η = {float(found.optimal):.3g}: 1/λ_max, half of the rate")
    assert "B_noise" in found.reason(4)
    assert f"η = {float(found.rate(4)):.3g}" in found.reason(4)
    assert str(found).endswith(found.reason(None))
    # Half of the full batch's rate at the critical batch size, as far as the cap is the same.
    critical = float(found.critical_batch_size)
    largest = min(float(found.optimal), float(found.curvature.greedy))
    np.testing.assert_allclose(learning_rate.for_batch_size(largest, critical, critical), largest / 2, rtol=1e-6)
