import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import per_example


def linear(params, batch):
    """Its examples' gradients are the rows of the batch."""
    return jnp.mean(batch @ params)


def written(rows):
    n, mean = len(rows), rows.mean(axis=0)
    trace = ((rows - mean) ** 2).sum() / (n - 1)
    return trace, mean @ mean - trace / n


def test_against_the_formula_and_a_jackknife_written_out(x64):
    rows = np.random.default_rng(0).normal(size=(40, 6)) + 0.8
    found = per_example.noise_scale(linear, jnp.zeros(6), jnp.asarray(rows))
    trace, squared = written(rows)
    np.testing.assert_allclose(found.trace, trace, rtol=1e-10)
    np.testing.assert_allclose(found.gradient_squared, squared, rtol=1e-10)
    np.testing.assert_allclose(found.mean_squared, np.sum(rows.mean(axis=0) ** 2), rtol=1e-10)
    np.testing.assert_allclose(found.value, trace / squared, rtol=1e-10)
    left_out = np.array([np.divide(*written(np.delete(rows, i, axis=0))) for i in range(40)])
    jackknife = np.sqrt(39 / 40 * np.sum((left_out - left_out.mean()) ** 2))
    np.testing.assert_allclose(found.standard_error, jackknife, rtol=1e-8)
    assert bool(found.resolved)


def test_it_is_unbiased_for_the_distribution_and_its_error_is_the_spread():
    """Samples of 200 from a known normal: tr Σ = 5, |G|² = 5 · .25."""
    draw = lambda key: 0.5 + jax.random.normal(key, (200, 5))
    one = lambda key: per_example.noise_scale(linear, jnp.zeros(5), draw(key))
    found = jax.lax.map(one, jax.random.split(jax.random.key(0), 400))
    for values, truth in ((found.trace, 5.0), (found.gradient_squared, 1.25)):
        error = float(values.std()) / 400**0.5
        assert abs(float(values.mean()) - truth) < 4 * error
    np.testing.assert_allclose(found.standard_error.mean(), found.value.std(), rtol=0.15)


def test_a_gradient_lost_in_noise_is_told():
    rows = jax.random.normal(jax.random.key(1), (30, 50))
    assert not bool(per_example.noise_scale(linear, jnp.zeros(50), rows).resolved)


def test_gradients_that_are_alike_do_not_cancel():
    rows = 1000 + 0.05 * jax.random.normal(jax.random.key(2), (100, 3))
    found = per_example.noise_scale(linear, jnp.zeros(3), rows)
    exact = np.asarray(rows, np.float64)
    np.testing.assert_allclose(found.trace, exact.var(axis=0, ddof=1).sum(), rtol=1e-2)
    spread = per_example.gradients(linear, jnp.zeros(3), rows).variance()
    np.testing.assert_allclose(spread, exact.var(axis=0, ddof=1), rtol=1e-2)


def test_many_examples_do_not_overflow_a_count():
    rows = jax.random.normal(jax.random.key(3), (50_000, 2)) + 1
    found = per_example.noise_scale(linear, jnp.zeros(2), rows)
    np.testing.assert_allclose(found.value, 1.0, rtol=0.05)


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_examples_are_refused(n):
    with pytest.raises(ValueError, match="3 examples or more"):
        per_example.noise_scale(linear, jnp.zeros(3), jnp.ones((n, 3)))


def test_each_layer_has_its_own(x64, mlp_problem):
    """Against the dense gradients of each leaf by itself."""
    loss, params, batch = mlp_problem
    dense = per_example.gradients(loss, params, batch).dense()
    rows = lambda tree: np.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(tree)], axis=1)
    layers = per_example.layer_noise_scale(loss, params, batch)
    assert list(layers) == ["0", "2"]
    for layer, found in layers.items():
        expected = per_example.noise_scale(linear, jnp.zeros(rows(dense[int(layer)]).shape[1]), rows(dense[int(layer)]))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), found, expected)
    whole = per_example.noise_scale(loss, params, batch)
    for name in ("trace", "mean_squared", "gradient_squared"):
        total = sum(getattr(found, name) for found in layers.values())
        np.testing.assert_allclose(total, getattr(whole, name), rtol=1e-10)
    leaves = per_example.layer_noise_scale(loss, params, list_of_batches(batch), layer_of=lambda name: name)
    assert list(leaves) == ["0/bias", "0/kernel", "2/bias", "2/kernel"]
    np.testing.assert_allclose(sum(x.trace for x in leaves.values()), whole.trace, rtol=1e-10)


def list_of_batches(batch):
    return [jax.tree.map(lambda x: x[:5], batch), jax.tree.map(lambda x: x[5:], batch)]
