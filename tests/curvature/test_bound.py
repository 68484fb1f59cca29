import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import curvature
from jaxnet.curvature import Eigensolver, LinearOperator, Space, _bound, _lanczos

KEY = jax.random.key(5)


def diagonal_loss(params, batch):
    """½ Σ d_i w_i²: its Hessian is diag(d)."""
    return 0.5 * jnp.vdot(batch.mean(axis=0), params**2)


def product(d, v):
    return d * v


@pytest.mark.parametrize("num_steps", [3, 6, 9, 16])
def test_the_sum_is_what_the_basis_holds_of_an_eigenvector(num_steps, x64):
    """Row j of the basis is p_j(A) q_0, so (u·q_j)² = p_j(λ)² (u·q_0)² — through restarts of a basis of 6."""
    d = jnp.asarray(np.append(np.random.default_rng(0).normal(size=30), [4.0, -5.0]))
    start = jax.random.normal(KEY, d.shape)
    op = LinearOperator(product, Space.of(d), d)
    solver = Eigensolver(op.space, max_matvecs=num_steps, ncv=6)
    end = solver.init(start)
    for _ in range(num_steps):
        if solver.full(end):
            end = solver.restart(end)
        end = solver.step(op, end, 1e-15)
    assert (int(end.num_discarded) > 0) == (num_steps > 6)
    rows = np.asarray(end.lanczos.basis)[: int(end.lanczos.size) + 1]
    for i in (30, 31):  # the two eigenvalues beyond the Ritz values, one at each end
        share = (start[i] / _lanczos.norm(start)) ** 2
        expected = np.log(np.sum(rows[:, i] ** 2) / share)
        np.testing.assert_allclose(_bound.log_sum(end.polynomials, d[i]), expected, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_the_share_of_a_random_unit_vector(n):
    draws = np.random.default_rng(0).normal(size=(20000, n))
    shares = draws[:, 0] ** 2 / (draws**2).sum(axis=1)
    w = np.exp(-_bound.log_inverse_share(n, 0.05))
    # Of two numbers or more, a draw is below the quantile with probability .05; a single number has all of the share.
    assert abs((shares < w).mean() - (0.05 if n > 1 else 0)) < 4 * (0.05 * 0.95 / 20000) ** 0.5


SPECTRA = {
    "gap": np.append(np.linspace(-1, 1, 400), 1.3),
    "network-like": np.append(np.random.default_rng(0).normal(size=500) * 0.05, [1.0, 0.8, 0.5]),
    "uniform": np.linspace(0.5, 1, 300),
}


@pytest.mark.parametrize("num_products", [8, 40])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_upper_bound_holds_in_its_promised_share(name, num_products):
    """1000 random starts, δ = .05: 95 % within three standard errors of a coin of that bias; restarts included."""
    d = SPECTRA[name]
    batch, top, params = jnp.asarray(d, jnp.float32)[None], d.max(), jnp.zeros(len(d))

    def one(key):
        found = curvature.sharpness(diagonal_loss, params, batch, key=key, max_matvecs=num_products, tol=1e-6)
        return found.upper_bound

    bounds = np.asarray(jax.lax.map(one, jax.random.split(KEY, 1000)))
    assert (bounds >= top * (1 - 1e-5)).mean() > 0.95 - 3 * (0.05 * 0.95 / 1000) ** 0.5
    assert np.median(bounds) < (1.5 if num_products == 8 else 1.01) * top


def test_ten_products_bound_a_network_like_spectrum_within_a_percent():
    """26 000 parameters, some outliers over a narrow bulk."""
    d = np.append(np.random.default_rng(0).normal(size=26000) * 0.02, [1.0, 0.7, 0.5, 0.4, 0.3])
    batch, params = jnp.asarray(d, jnp.float32)[None], jnp.zeros(len(d))
    one = lambda key: curvature.sharpness(diagonal_loss, params, batch, key=key, max_matvecs=10, tol=1e-6).upper_bound
    bounds = np.asarray(jax.lax.map(one, jax.random.split(KEY, 40)))
    assert np.median(bounds) < 1.01
    assert (bounds >= 1 - 1e-5).mean() > 0.95 - 3 * (0.05 * 0.95 / 40) ** 0.5


def test_nothing_is_excluded_beyond_the_room(x64):
    """More discarded Ritz values than are remembered: no bound, rather than a wrong one."""
    d = jnp.linspace(-1, 1, 400)
    solver = Eigensolver(Space.of(d), max_matvecs=60, ncv=4)
    _, end = solver.search(LinearOperator(product, solver.space, d), jax.random.normal(KEY, d.shape), 1e-15)
    known = end.polynomials
    assert np.isfinite(_bound.log_sum(known, 1.1))
    assert _bound.log_sum(known._replace(discarded=known.discarded[:5]), 1.1) == -np.inf
