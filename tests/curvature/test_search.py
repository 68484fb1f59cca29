import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import curvature, losses, nn
from jaxnet.curvature import LinearOperator, Space

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def product(d, v):
    return d * v


def diagonal(d):
    return LinearOperator(product, Space.of(jnp.zeros(len(d))), jnp.asarray(d, jnp.float32))


SPECTRA = {
    "laplacian": 2 - 2 * np.cos(np.arange(1, 61) * np.pi / 61),
    "uniform": np.linspace(0, 1, 400),
    "network-like": np.append(RNG.normal(size=500) * 0.05, [1.0, 0.97, 0.5]),
    "strakos": 0.1 + np.arange(100) / 99 * 99.9 * 0.9 ** np.arange(99, -1, -1),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_converged_is_honest(name):
    """1000 random starts: of those that call themselves converged, 99 % are within the tolerance."""
    op, top = diagonal(SPECTRA[name]), SPECTRA[name].max()

    def one(key):
        found = curvature.eigsh(op, key=key)
        return found.values[0], found.converged

    values, converged = map(np.asarray, jax.lax.map(one, jax.random.split(KEY, 1000)))
    assert converged.all()
    assert (np.abs(values - top) <= 1e-3 * top).mean() >= 0.99


@pytest.mark.parametrize("which", ["SA", "LM", "BE"])
def test_the_other_ends_are_honest_too(which):
    """The Laplacian is dense at both ends; shifted so that both are of one size."""
    d = SPECTRA["laplacian"] - 2
    op, k = diagonal(d), 2 if which == "BE" else 1
    expected = {"SA": d[:1], "LM": np.abs(d).max(), "BE": d[[-1, 0]]}[which]

    def one(key):
        found = curvature.eigsh(op, k, which=which, key=key)
        return found.values, found.converged

    values, converged = map(np.asarray, jax.lax.map(one, jax.random.split(KEY, 300)))
    assert converged.all()
    error = np.abs((np.abs(values) if which == "LM" else values) - expected).max(axis=1)
    assert (error <= 2e-3).mean() >= 0.98


def test_four_vectors_find_the_top_of_every_spectrum():
    for d in SPECTRA.values():
        found = curvature.eigsh(diagonal(d), key=KEY, ncv=4)
        assert bool(found.converged)
        np.testing.assert_allclose(found.values[0], d.max(), rtol=1e-3)


def test_a_search_takes_its_basis_and_three_vectors_more_than_a_gradient():
    """Temporary memory of the compiled program, in vectors of the size of 10⁶ params; what it returns is apart."""
    model = nn.mlp([1000, 1], activation=jnp.tanh)
    loss = losses.mean_loss(model.apply, losses.squared_error)
    params = jax.eval_shape(lambda: model.init(KEY, (1000,)))
    batch = (jax.ShapeDtypeStruct((4, 1000), jnp.float32), jax.ShapeDtypeStruct((4, 1), jnp.float32))
    one_vector = 4 * sum(x.size for x in jax.tree.leaves(params))

    def taken(function):
        compiled = jax.jit(function).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes / one_vector

    of_search = lambda ncv: taken(lambda p, b: curvature.sharpness(loss, p, b, key=KEY, ncv=ncv))
    gradient = taken(jax.grad(loss))
    assert 4 <= of_search(4) - gradient <= 8
    rows = curvature.Eigensolver(curvature.Space.of(jnp.zeros(10**6))).basis + 1
    assert rows <= of_search(None) - gradient <= rows + 3


def test_a_long_basis_is_restarted_block_by_block(monkeypatch):
    """The blocks' edges, the last of which overlaps, leave no trace: A Q = Q T + β q eᵀ goes on holding."""
    monkeypatch.setattr(sys.modules["jaxnet.curvature._lanczos"], "_BLOCK", 32)
    jax.clear_caches()
    for n in (64, 97, 128, 333):
        d = np.linspace(1, 2, n) ** 3
        found = curvature.eigsh(diagonal(d), 2, key=KEY, ncv=8, tol=1e-6)
        assert bool(found.converged)
        np.testing.assert_allclose(found.values, d[::-1][:2], rtol=3e-6)
        np.testing.assert_allclose(np.abs(found.vectors[0]), np.eye(n)[-1], atol=2e-3)
    jax.clear_caches()


def test_a_basis_too_small_is_refused():
    with pytest.raises(ValueError, match="ncv: expected at least k \\+ 2 = 5"):
        curvature.eigsh(diagonal(np.ones(9)), 3, key=KEY, ncv=4)


def test_a_million_dimensions_with_a_gap():
    """A diagonal conjugated by a Householder reflection, Q = I − 2uuᵀ."""
    n = 10**6
    d = np.append(np.linspace(-0.3, 0.3, n - 2), [0.8, 1.0]).astype(np.float32)
    u = np.random.default_rng(1).normal(size=n).astype(np.float32)
    u /= np.linalg.norm(u)

    def conjugated(operands, v):
        d, u = operands
        reflect = lambda x: x - 2 * u * jnp.vdot(u, x, precision="highest")
        return reflect(d * reflect(v))

    op = LinearOperator(conjugated, Space.of(jnp.zeros(n)), (jnp.asarray(d), jnp.asarray(u)))
    found = curvature.eigsh(op, 2, key=KEY, tol=1e-5)
    assert bool(found.converged)
    np.testing.assert_allclose(found.values, [1.0, 0.8], atol=1e-5)
    top = np.asarray(found.vectors[0])
    expected = -2 * u * u[-1]
    expected[-1] += 1
    np.testing.assert_allclose(abs(top @ expected), 1.0, atol=1e-3)


@pytest.mark.parametrize(("which", "k"), [("LA", 1), ("BE", 4)])
def test_a_loop_of_ones_own_is_the_search(which, k):
    op = diagonal(SPECTRA["network-like"])
    solver = curvature.Eigensolver(op.space, k, which)
    state = solver.init(solver.start(KEY))
    while not solver.done(state):
        if solver.full(state):
            state = solver.restart(state)
        state = solver.step(op, state, 1e-4)
    found = solver.result(solver.restart(state))
    expected = curvature.eigsh(op, k, which=which, key=KEY, tol=1e-4)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)
    assert int(found.num_matvecs) == int(expected.num_matvecs)
    assert bool(found.converged)


@pytest.mark.parametrize("apart", [3e-3, 1e-3, 1e-4])
def test_a_pair_much_closer_than_the_gap_to_the_rest_is_no_false_end(apart):
    """The residual tells what is not told apart yet, where the estimate by the gap to what has been seen does not."""
    rest = np.random.default_rng(0).uniform(0, 0.5, 1000)
    op = diagonal(np.r_[rest, 1, 1 - apart])

    def one(key):
        found = curvature.eigsh(op, tol=0.1 * apart, key=key)
        return found.values[0], found.converged

    values, converged = map(np.asarray, jax.lax.map(one, jax.random.split(KEY, 100)))
    assert converged.all()
    assert (np.abs(values - 1) <= 0.1 * apart + 1e-6).mean() >= 0.98


def test_what_rounding_hides_is_not_called_converged():
    """The Laplacian's smallest eigenvalue, 7e-5 beside a norm of 4: single precision leaves it uncertain by 3 %."""
    d = (2 - 2 * np.cos(np.pi * np.arange(1, 401) / 400) + 1e-5).astype(np.float32)
    for seed in range(3):
        found = curvature.eigsh(diagonal(d), which="SA", key=jax.random.key(seed))
        error = abs(float(found.values[0]) - d.min())
        assert not found.converged or error <= 1e-3 * d.min()
    assert curvature.eigsh(diagonal(d), which="SA", tol=0.5, key=KEY).converged
