import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxnet import data, losses, nn
from jaxnet.learning_rate._mean_square import sgd_stability, stationary_excess

NEURON = losses.mean_loss(nn.linear_neuron().apply, losses.squared_error)


def squares(params, batch):
    """½ mean |A_n(w − c)|² for matrices A_n: H_n = A_nᵀA_n, and the minimum is at c = (1, …, 1), without noise."""
    return jnp.mean(0.5 * jnp.sum(jnp.einsum("nij,j->ni", batch, params - 1) ** 2, axis=1))


def share_of(n, batch_size, replace):
    return 1 / batch_size if replace else (n - batch_size) / (batch_size * (n - 1))


def by_kronecker(blocks, batch_size, replace):
    """C and D as the paper writes them, (d², d²)."""
    p, mean, eye = share_of(len(blocks), batch_size, replace), blocks.mean(axis=0), np.eye(blocks.shape[1])
    both = np.mean([np.kron(h, h) for h in blocks], axis=0)
    return (np.kron(mean, eye) + np.kron(eye, mean)) / 2, (1 - p) * np.kron(mean, mean) + p * both


def dense_limit(blocks, batch_size, replace):
    c, d = by_kronecker(blocks, batch_size, replace)
    return 2 / np.linalg.eigvals(np.linalg.pinv(c, rcond=1e-12, hermitian=True) @ d).real.max()


def random_factors(shape, seed, decay=0.7):
    return np.random.default_rng(seed).normal(size=shape) * decay ** np.arange(shape[-1])


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("shape", [(5, 1, 2), (7, 2, 4), (9, 3, 6), (3, 1, 5)])
def test_the_limit_is_the_papers_dense_one(x64, shape, replace):
    """The last shape has more params than rows: H has a null space, and the examples' H_n share it."""
    factors = random_factors(shape, seed=shape[0])
    blocks = np.einsum("nij,nik->njk", factors, factors)
    sizes = [1, 2, shape[0]]
    found = sgd_stability(squares, jnp.zeros(shape[-1]), jnp.asarray(factors), sizes, replace=replace)
    np.testing.assert_allclose(found, [dense_limit(blocks, b, replace) for b in sizes], rtol=2e-6)


def test_it_is_where_the_map_of_second_moments_passes_one(x64):
    """ρ(T) by dense eigenvalues of T itself, just below and just above the limit."""
    factors = random_factors((8, 2, 3), seed=1)
    blocks, eye = np.einsum("nij,nik->njk", factors, factors), np.eye(3)
    limit = float(sgd_stability(squares, jnp.zeros(3), jnp.asarray(factors), 3, replace=False))

    def radius(rate):
        step = eye - rate * blocks.mean(axis=0)
        noise = np.mean([np.kron(h, h) for h in blocks - blocks.mean(axis=0)], axis=0)
        t = np.kron(step, step) + rate**2 * share_of(8, 3, False) * noise
        return np.abs(np.linalg.eigvals(t)).max()

    assert radius(limit * (1 - 1e-5)) < 1 < radius(limit * (1 + 1e-5))


@pytest.mark.parametrize("n", [4, 6])
def test_gauss_newton_blocks_from_rows_and_from_their_gram_matrix(x64, n):
    """A softmax regression of 3 classes is linear in its 15 params: Gauss–Newton and Hessian are the same there."""
    model = nn.dense(3)
    params = model.init(jax.random.key(0), (4,))
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    batch = (jax.random.normal(jax.random.key(1), (n, 4)), jnp.arange(n) % 3)
    exact = sgd_stability(loss, params, batch, [1, 3], replace=True)
    by_rows = sgd_stability(losses.chunked(loss, 4), params, batch, [1, 3], replace=True, gauss_newton=True)
    np.testing.assert_allclose(by_rows, exact, rtol=2e-6)
    one = lambda x, w: loss(jax.tree.map(lambda p, q: p + q, params, w), (x[0][None], x[1][None]))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    blocks = [jax.hessian(lambda w, x=x: one(x, unravel(w)))(0 * flat) for x in zip(*batch, strict=True)]
    np.testing.assert_allclose(exact[0], dense_limit(np.array(blocks), 1, True), rtol=2e-6)


def test_a_network_on_its_own_outputs_has_hessians_that_are_gauss_newton(x64, mlp_problem):
    loss, params, (inputs, _) = mlp_problem
    batch = (inputs, jax.nn.softmax(loss.apply(params, inputs)))
    exact = sgd_stability(loss, params, batch, [1, 4], replace=False)
    by_rows = sgd_stability(loss, params, batch, [1, 4], replace=False, gauss_newton=True)
    np.testing.assert_allclose(by_rows, exact, rtol=1e-5)


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_sixty_params_in_closed_form(x64, gauss_newton):
    """Examples √a_k times the rows of a rotation: λ_k = a_k/d, and 2/η* = max (1 − p)λ_k + p a_k."""
    values = np.linspace(0.5, 3, 60)
    batch = (jnp.asarray(np.sqrt(values)[:, None] * rotation(60, 0)), jnp.zeros(60))
    loss = losses.mean_loss(lambda w, x: x @ w, losses.squared_error)
    for batch_size in (1, 7):
        p = share_of(60, batch_size, False)
        found = sgd_stability(loss, jnp.ones(60), batch, batch_size, replace=False, gauss_newton=gauss_newton)
        np.testing.assert_allclose(2 / found, (1 - p) * 3 / 60 + p * 3, rtol=2e-6)


def gaussian_design(deviations):
    """3^d points whose moments up to the fifth are those of a Gaussian: 0 twice as often as ±√3, twice."""
    nodes = np.array([0, 0, 0, 0, 3**0.5, -(3**0.5)])
    grid = np.stack(np.meshgrid(*[nodes] * len(deviations), indexing="ij"), axis=-1).reshape(-1, len(deviations))
    return grid * deviations


def test_gaussian_inputs_in_closed_form(x64):
    """Σ (ηλ_i/B)/(2 − ηλ_i(1 + 1/B)) = 1 at the limit; 1296 points in four dimensions, turned."""
    eigenvalues = np.array([2.0, 1.0, 0.5, 0.1])
    inputs = gaussian_design(np.sqrt(eigenvalues)) @ rotation(4, 1)
    batch = (jnp.asarray(inputs), jnp.zeros(len(inputs)))
    loss = losses.mean_loss(lambda w, x: x @ w, losses.squared_error)
    for batch_size in (1, 3, 20):

        def beyond(rate, b=batch_size):
            return np.sum(rate * eigenvalues / b / (2 - rate * eigenvalues * (1 + 1 / b))) - 1

        closed = optimize.brentq(beyond, 1e-6, 2 / (eigenvalues[0] * (1 + 1 / batch_size)) - 1e-9)
        found = sgd_stability(loss, jnp.ones(4), batch, batch_size, replace=True)
        np.testing.assert_allclose(found, closed, rtol=2e-6)


def test_the_whole_set_without_replacement_is_gradient_descent(x64):
    batch = data.two_gaussians_exact(20)
    params = nn.linear_neuron().init(jax.random.key(0), (2,))
    np.testing.assert_allclose(sgd_stability(NEURON, params, batch, 20, replace=False), 2.0, rtol=1e-6)
    np.testing.assert_allclose(
        sgd_stability(squares, jnp.zeros(2), 2 * jnp.eye(2)[None], 1, replace=False), 2 / 4, rtol=1e-6
    )


def test_single_precision():
    with jax.enable_x64(True):
        exact = sgd_stability(squares, jnp.zeros(6), jnp.asarray(random_factors((9, 3, 6), 0)), 2, replace=True)
    factors = jnp.asarray(random_factors((9, 3, 6), 0), jnp.float32)
    found = sgd_stability(squares, jnp.zeros(6), factors, 2, replace=True)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_inside_a_jit_and_compiled_once(x64):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def limit(params, factors):
        return sgd_stability(squares, params, factors, [1, 2], replace=True)

    for seed in range(2):
        factors = jnp.asarray(random_factors((5, 1, 2), seed))
        outside = sgd_stability(squares, jnp.zeros(2), factors, [1, 2], replace=True)
        np.testing.assert_allclose(limit(jnp.zeros(2), factors), outside, rtol=1e-12)


def noisy(params, batch):
    """½ mean |A_n(w − t_n)|², quadratic with noise."""
    a, t = batch
    return jnp.mean(0.5 * jnp.sum(jnp.einsum("nij,nj->ni", a, params - t) ** 2, axis=1))


@pytest.mark.parametrize("replace", [True, False])
def test_the_excess_is_that_of_the_dense_equation(x64, replace):
    factors, targets = random_factors((7, 2, 3), seed=2), np.random.default_rng(3).normal(size=(7, 3))
    blocks = np.einsum("nij,nik->njk", factors, factors)
    mean, pulls = blocks.mean(axis=0), np.einsum("njk,nk->nj", blocks, targets)
    minimum = np.linalg.solve(mean, pulls.mean(axis=0))
    slopes = blocks @ minimum - pulls
    batch = (jnp.asarray(factors), jnp.asarray(targets))
    limit = dense_limit(blocks, 2, replace)
    rates = limit * np.array([[0.01, 0.3], [0.9, 1.01]])
    found = stationary_excess(noisy, jnp.asarray(minimum), batch, 2, rates, replace=replace)
    assert found.shape == (2, 2)
    assert found[1, 1] == jnp.inf
    c, d = by_kronecker(blocks, 2, replace)
    for rate, value in zip(rates.ravel()[:3], found.ravel()[:3], strict=True):
        noise = rate**2 * share_of(7, 2, replace) * slopes.T @ slopes / 7
        moment = np.linalg.solve(2 * rate * c - rate**2 * d, noise.ravel())
        np.testing.assert_allclose(value, mean.ravel() @ moment / 2, rtol=1e-6)
    assert stationary_excess(noisy, jnp.asarray(minimum), batch, 7, 0.1 * limit, replace=False) < 1e-15


def test_no_noise_no_excess(x64):
    factors = jnp.asarray(random_factors((5, 1, 2), 0))
    assert stationary_excess(squares, jnp.ones(2), factors, 1, 0.01, replace=True) == 0


def test_a_saddle_is_refused_and_gauss_newton_is_not(x64, mlp_problem):
    loss, params, batch = mlp_problem
    with pytest.raises(ValueError, match=r"eigenvalues go from -.*gauss_newton=True"):
        sgd_stability(loss, params, batch, 2, replace=True)
    assert jnp.isnan(jax.jit(lambda p: sgd_stability(loss, p, batch, 2, replace=True))(params))
    assert sgd_stability(loss, params, batch, 2, replace=True, gauss_newton=True) > 0


def test_examples_that_cancel_are_refused(x64):
    """±w₁² cancel in the mean, but not in a batch: no rate holds them."""
    loss = lambda w, a: jnp.mean(a * w[0] ** 2 + w[1] ** 2)
    with pytest.raises(ValueError, match="single examples are curved where their mean is flat"):
        sgd_stability(loss, jnp.ones(2), jnp.array([1.0, -1.0]), 1, replace=True)


def test_bad_input(x64):
    factors, params = jnp.asarray(random_factors((5, 1, 2), 0)), jnp.zeros(2)
    for size in (0, 6, 1.5, [1, 6]):
        with pytest.raises(ValueError, match="batch_size: expected 1 to 5"):
            sgd_stability(squares, params, factors, size, replace=True)
    for rate in (0.0, -1.0, float("inf"), float("nan"), [0.1, 0.0]):
        with pytest.raises(ValueError, match="rate: expected positive and finite"):
            stationary_excess(squares, jnp.ones(2), factors, 1, rate, replace=True)
    with pytest.raises(ValueError, match="params: expected a minimum"):
        stationary_excess(squares, params, factors, 1, 0.1, replace=True)
    with pytest.raises(ValueError, match="not positive"):
        sgd_stability(lambda w, b: -squares(w, b), params, factors, 1, replace=True)
    with pytest.raises(ValueError, match="not positive"):
        sgd_stability(lambda w, b: jnp.mean(b) * jnp.sum(w), params, factors, 1, replace=True)
    with pytest.raises(ValueError, match="not finite: params, loss"):
        sgd_stability(squares, jnp.array([jnp.nan, 0]), factors, 1, replace=True)
    with pytest.raises(ValueError, match="mean of their own losses"):
        sgd_stability(lambda w, b: 5 * squares(w, b) * len(b), params, factors, 1, replace=True)
    with pytest.raises(TypeError, match="mean_loss"):
        sgd_stability(squares, params, factors, 1, replace=True, gauss_newton=True)
    with pytest.raises(TypeError, match="float32 or float64"):
        sgd_stability(squares, params.astype(jnp.bfloat16), factors, 1, replace=True)
    with pytest.raises(ValueError, match="matrix of 5000 rows"):
        sgd_stability(lambda w, b: jnp.mean((b @ w) ** 2), jnp.zeros(5000), jnp.ones((2, 5000)), 1, replace=True)
