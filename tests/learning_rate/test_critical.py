import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import learning_rate

KEY = jax.random.key(5)
# A quadratic with a few negative curvatures, over two leaves of odd shapes, one of them missing.
MATRIX = np.diag([5.0, 2.0, 1.0, 0.5, 0.1, -0.2, 3.0])
TURNED = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 7)))[0]
MATRIX = TURNED @ MATRIX @ TURNED.T


def flat(params):
    return jnp.concatenate([params["w"].ravel(), params["b"]])


def quadratic(params, batch):
    """½ω′Hω + ⟨mean of the batch, ω⟩: of a batch with the mean m, g = Hω + m."""
    w = flat(params)
    return 0.5 * w @ jnp.asarray(MATRIX, w.dtype) @ w + batch.mean(axis=0) @ w


def problem():
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(2, 3))), "b": jnp.asarray(rng.normal(size=1)), "none": None}
    batch = jnp.asarray(rng.normal(size=(11, 7)))
    w = np.concatenate([np.ravel(params["w"]), params["b"]])
    return params, batch, MATRIX @ w + np.asarray(batch).mean(axis=0)


@pytest.mark.parametrize("guess", [1e-3, 0.4, 70.0])
def test_gradient_descent_on_a_quadratic(x64, guess):
    params, batch, g = problem()
    found = learning_rate.critical_sharpness(quadratic, params, batch, guess=guess)
    expected = 2 * g @ g / (g @ MATRIX @ g)
    np.testing.assert_allclose(found.rate, expected, rtol=1e-12)
    np.testing.assert_allclose(found.rate, 2 * learning_rate.greedy(quadratic, params, batch), rtol=1e-12)
    np.testing.assert_allclose(found.value, g @ MATRIX @ g / (g @ g), rtol=1e-12)
    assert found.bracket[0] <= expected <= found.bracket[1]
    assert found.converged
    assert 0 < found.error <= 0.06 * found.value
    # The start, an octave, its neighbours, and five halvings to a twentieth of it.
    assert int(found.num_passes) <= 1 + abs(np.log2(guess / expected)) + 2 + 5


def test_the_update_of_any_optimizer_is_a_direction(x64):
    params, batch, g = problem()
    optimizer = optax.adamw(1.0, weight_decay=0.1)
    gradient, state = jax.grad(quadratic)(params, batch), optimizer.init(params)
    for _ in range(3):
        u, state = optimizer.update(gradient, state, params)
    found = learning_rate.critical_sharpness(quadratic, params, batch, u, guess=1e-3)
    v = np.asarray(flat(u))
    np.testing.assert_allclose(found.rate, -2 * g @ v / (v @ MATRIX @ v), rtol=1e-11)


def test_along_the_sharpest_direction_it_is_the_largest_eigenvalue(x64):
    loss = lambda p, b: 0.5 * b.mean() * p @ MATRIX @ p
    values, vectors = np.linalg.eigh(MATRIX)
    found = learning_rate.critical_sharpness(loss, jnp.asarray(vectors[:, -1]), jnp.ones(3))
    np.testing.assert_allclose(found.value, values[-1], rtol=1e-12)


def test_a_stream_vmap_and_half_precision_give_the_same(x64):
    params, batch, _ = problem()
    whole = learning_rate.critical_sharpness(quadratic, params, batch)
    streamed = learning_rate.critical_sharpness(quadratic, params, Loader(batch))
    chex.assert_trees_all_close(streamed, whole, rtol=1e-10)
    several = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
    rates = jax.vmap(lambda p: learning_rate.critical_sharpness(quadratic, p, batch).rate)(several)
    np.testing.assert_allclose(rates[0], whole.rate, rtol=1e-10)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    expected = learning_rate.critical_sharpness(quadratic, rounded, batch.astype(jnp.float32))
    np.testing.assert_allclose(
        learning_rate.critical_sharpness(quadratic, half, batch.astype(jnp.float32)).rate, expected.rate, rtol=1e-5
    )


class Loader:
    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        for first in range(0, 11, 4):
            yield self.batch[first : first + 4]


def test_what_has_no_critical_rate_comes_back_as_data():
    line = lambda p, b: b.mean() * p.sum()
    falling = learning_rate.critical_sharpness(line, jnp.ones(3), jnp.ones(2))
    assert jnp.isinf(falling.rate)
    assert falling.value == 0
    uphill = learning_rate.critical_sharpness(line, jnp.ones(3), jnp.ones(2), jnp.ones(3))
    broken = learning_rate.critical_sharpness(line, jnp.full(3, jnp.nan), jnp.ones(2))
    still = learning_rate.critical_sharpness(lambda p, b: b.mean() * (p**2).sum(), jnp.zeros(3), jnp.ones(2))
    for found in (uphill, broken, still):
        assert jnp.isnan(found.rate)
    for found in (falling, uphill, broken, still):
        assert not found.converged
    # A slope that rounding of the loss hides.
    hidden = lambda p, b: b.mean() * (1e6 + 0.5 * (p**2).sum())
    assert not learning_rate.critical_sharpness(hidden, jnp.full(3, 0.05), jnp.ones(2)).converged
    # Where the step overflows the loss has risen.
    steep = lambda p, b: b.mean() * jnp.exp(p**2).sum()
    found = learning_rate.critical_sharpness(steep, jnp.ones(1), jnp.ones(2), guess=1e4)
    np.testing.assert_allclose(1 - found.rate * 2 * np.e, -1, rtol=0.05)
    assert found.converged


def test_another_point_compiles_nothing():
    traces = []

    def loss(p, b):
        traces.append(1)
        return b.mean() * (p**2).sum()

    counts = []
    for scale in (1.0, 2.0, 3.0):
        found = learning_rate.critical_sharpness(loss, scale * jnp.ones(3), scale * jnp.ones(2), guess=scale)
        np.testing.assert_allclose(found.value, 2 * scale, rtol=1e-5)
        counts.append(len(traces))
    assert counts[0] == counts[2] > 0


def test_bad_arguments():
    line = lambda p, b: b.mean() * p.sum()
    with pytest.raises(ValueError, match="guess: expected a positive and finite rate"):
        learning_rate.critical_sharpness(line, jnp.ones(3), jnp.ones(2), guess=0.0)
    with pytest.raises(ValueError, match="direction: expected a pytree like params"):
        learning_rate.critical_sharpness(line, jnp.ones(3), jnp.ones(2), jnp.ones(4))
    with pytest.raises(ValueError, match="tol: expected a positive number"):
        learning_rate.critical_sharpness(line, jnp.ones(3), jnp.ones(2), tol=0)


@pytest.mark.parametrize("guess", [np.inf, np.nan, 0.0])
def test_a_last_rate_that_was_none_is_no_place_to_look(x64, guess):
    params, batch, g = problem()
    found = learning_rate.critical_sharpness(quadratic, params, batch, guess=jnp.asarray(guess))
    np.testing.assert_allclose(found.rate, 2 * g @ g / (g @ MATRIX @ g), rtol=1e-12)
    assert found.converged
