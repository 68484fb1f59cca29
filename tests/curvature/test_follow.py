import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import curvature, data, losses, nn, training
from jaxnet.curvature import LinearOperator, Space, follow

KEY = jax.random.key(3)


def product(a, v):
    flat = a @ jnp.concatenate([v["a"], v["b"].reshape(-1)])
    return {"a": flat[:20], "b": flat[20:].reshape(-1, 2)}


def operator(a):
    a = jnp.asarray(a)
    return LinearOperator(product, Space.of({"a": jnp.zeros(20, a.dtype), "b": jnp.zeros((15, 2), a.dtype)}), a)


def turned(values, angle, seed=0):
    """A symmetric matrix with these eigenvalues whose eigenvectors are those of ``seed`` turned by about an angle."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(50, 50)))[0]
    s = rng.normal(size=(50, 50)) * angle / 50**0.5
    q = q @ np.linalg.qr(np.eye(50) + s - s.T)[0]
    return q @ np.diag(values) @ q.T


@pytest.mark.parametrize("seed", range(10))
def test_what_overtakes_the_first_is_seen(seed, x64):
    """The two largest are 2 % apart and change places: from the first's vector alone it could not be seen."""
    rest = np.linspace(-0.3, 0.6, 47)
    before = operator(turned(np.r_[rest, 0.9, 0.98, 1.0], 0, seed))
    after = turned(np.r_[rest, 0.9, 1.0, 0.98], 0.03, seed)
    at = follow(before, before.space.zeros(), 1e-6, key=KEY)
    found = follow(operator(after), at.vectors, 1e-3, key=KEY)
    assert found.converged
    np.testing.assert_allclose(found.value, np.linalg.eigvalsh(after)[-1], rtol=1e-3)
    assert int(found.num_matvecs) <= 10
    top = np.concatenate([np.ravel(x[0]) for x in jax.tree.leaves(found.vectors)])
    np.testing.assert_allclose(
        np.linalg.norm(after @ top - found.value * top), found.residual_norm, rtol=1e-6, atol=1e-9
    )


def test_from_nothing_it_is_a_search(x64):
    a = turned(np.linspace(-1, 1, 50) ** 3, 0.0)
    op = operator(a)
    none = op.space.zeros()
    for start in (none, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), none)):
        found = follow(op, start, 1e-8, key=KEY)
        np.testing.assert_allclose(found.value, 1, rtol=1e-8)
        assert found.converged
    flat = jnp.stack([jnp.concatenate([x[i].ravel() for x in jax.tree.leaves(found.vectors)]) for i in range(3)])
    np.testing.assert_allclose(flat @ flat.T, np.eye(3), atol=1e-10)
    np.testing.assert_allclose(flat @ a @ flat.T, np.diag(np.diag(flat @ a @ flat.T)), atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_spaces_and_a_matrix_of_zeros(n):
    d = jnp.arange(1.0, n + 1)
    op = LinearOperator(lambda d, v: d * v, Space.of(d), d)
    found = follow(op, jnp.zeros(n), 1e-5, key=KEY)
    np.testing.assert_allclose(found.value, n, rtol=1e-5)
    assert found.vectors.shape == (n, n)
    assert found.converged
    assert follow(0.0 * op, jnp.zeros(n), 1e-5, key=KEY).value == 0


def test_what_rounding_hides_is_not_called_converged():
    """A largest eigenvalue of 1e-4 beside a norm of 1, in single precision: 1e-5 of it is 8 times below eps‖A‖."""
    d = jnp.append(jnp.linspace(-1.0, -0.1, 60), 1e-4)
    op = LinearOperator(lambda d, v: d * v, Space.of(d), d)
    starts = jnp.eye(61)[jnp.array([60, 59, 58])]
    assert not follow(op, starts, 1e-5, key=KEY).converged
    assert follow(op, starts, 1e-1, key=KEY).converged


@pytest.mark.parametrize(("margin", "told"), [(5, True), (20, False), (60, False)])
def test_a_search_ends_where_products_are_rounding(all_but_certain, margin, told):
    loss, params, batch, true = all_but_certain(margin)
    op = curvature.hessian(loss, params, batch)
    found = follow(op, op.space.zeros(), 0.05, key=KEY)
    assert int(found.num_matvecs) <= 20
    assert found.converged == told
    np.testing.assert_allclose(found.value, true, rtol=0.05 if told else 0.6)


def test_what_is_not_finite_fails():
    d = jnp.ones(5).at[2].set(jnp.nan)
    found = follow(LinearOperator(lambda d, v: d * v, Space.of(d), d), jnp.ones(5), 1e-3, key=KEY)
    assert not found.converged
    assert jnp.isnan(found.value)
    with pytest.raises(ValueError, match="v0: expected a pytree like params"):
        follow(operator(np.eye(50)), {"a": jnp.zeros(20), "c": jnp.zeros((15, 2))}, 1e-3, key=KEY)


@pytest.mark.slow
def test_at_the_edge_of_stability_99_checks_in_100_are_within_the_tolerance():
    """Ten seeds of gradient descent on digits, 100 checks each, against a search from anywhere."""
    inputs, labels = jax.tree.map(lambda x: x[:500], data.digits())
    batch = (inputs, jax.nn.one_hot(labels, 10))
    model = nn.mlp([32, 32, 10], activation=jnp.tanh)
    loss = losses.mean_loss(model.apply, losses.squared_error)
    update = training.make_update(loss, optax.sgd(0.3))

    def check(carry, key):
        state, start = carry
        state, _ = training.trajectory(update, state, batch, num_steps=21)
        op = curvature.hessian(loss, state.params, batch)
        found = follow(op, start, 1e-3, key=key)
        true = curvature.eigsh(op, 3, tol=1e-5, key=key).values[0]
        return (state, found.vectors), (found.value, true, found.num_matvecs)

    def run(seed):
        params = model.init(jax.random.key(seed), (64,))
        begin = (training.init_state(params, optax.sgd(0.3)), jax.tree.map(lambda x: jnp.zeros((3, *x.shape)), params))
        return training.trajectory(check, begin, jax.random.split(jax.random.key(seed), 100))[1]

    value, true, products = map(np.ravel, jax.lax.map(run, jnp.arange(10)))
    assert (np.abs(value - true) > 1e-3 * true).mean() <= 0.01
    assert np.median(products) <= 6
