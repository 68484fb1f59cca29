import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import curvature, data, losses, nn

KEY = jax.random.key(2)


def dense_product(a, v):
    return a @ v


def diagonal_loss(params, batch):
    """½ Σ d_i w_i²: its Hessian is diag(d)."""
    return 0.5 * jnp.vdot(batch.mean(axis=0), params**2)


def test_two_gaussians_have_their_exact_sharpness(x64):
    batch = data.two_gaussians_exact()
    neuron = nn.linear_neuron()
    params = neuron.init(KEY, (2,))
    loss = losses.mean_loss(neuron.apply, losses.squared_error)
    found = curvature.sharpness(loss, params, batch, key=KEY, tol=1e-10)
    np.testing.assert_allclose(found.value, 1.0, rtol=1e-12)
    np.testing.assert_allclose(abs(found.vector["bias"]), 1.0, rtol=1e-6)
    assert found.upper_bound >= found.value
    assert int(found.num_matvecs) == 3


def test_a_product_of_two_weights_has_the_known_sharpness(x64):
    loss = lambda p, batch: jnp.mean(0.5 * (p["u"] * p["v"] - batch) ** 2)
    params = {"u": jnp.array(2.0), "v": jnp.array(0.5)}
    found = curvature.sharpness(loss, params, jnp.ones(3), key=KEY)
    np.testing.assert_allclose(found.value, 4.25, rtol=1e-12)


def test_a_warm_start_has_no_certificate():
    batch, params = jnp.linspace(0, 1, 50)[None], jnp.zeros(50)
    cold = curvature.sharpness(diagonal_loss, params, batch, key=KEY)
    warm = curvature.sharpness(diagonal_loss, params, batch, key=KEY, v0=cold.vector)
    assert np.isfinite(cold.upper_bound)
    assert np.isnan(warm.upper_bound)
    assert int(warm.num_matvecs) < int(cold.num_matvecs)


def test_a_warm_start_finds_an_eigenvalue_that_has_overtaken():
    """E = ½w₀²w₂ + ½w₁²(3 − w₂): following w₀'s eigenvector, which stays exact while w₁'s becomes the larger."""
    loss = lambda w, b: b.mean() * (0.5 * w[0] ** 2 * w[2] + 0.5 * w[1] ** 2 * (3 - w[2]))
    vector = jnp.array([1.0, 0, 0])
    for w2 in (2.0, 1.8, 1.2, 1.0):
        found = curvature.sharpness(loss, jnp.array([0, 0, w2]), jnp.ones(2), key=KEY, v0=vector)
        np.testing.assert_allclose(found.value, max(w2, 3 - w2), rtol=1e-3)
        vector = found.vector


def test_the_gradient_of_an_eigenvalue_is_dense_autodiffs(mlp_problem):
    loss, params, batch = mlp_problem
    flat, unravel = ravel_pytree(params)
    inner = lambda w: loss(unravel(w), batch)
    expected = jax.jit(jax.grad(lambda w: jnp.linalg.eigvalsh(jax.hessian(inner)(w))[-1]))(flat)
    ours = jax.jit(jax.grad(lambda p: curvature.sharpness(loss, p, batch, key=KEY, tol=1e-13).value))(params)
    np.testing.assert_allclose(ravel_pytree(ours)[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("v0", [None, (0.2, 1.0, 0.1)])
def test_the_derivative_by_what_a_loss_closes_over(x64, v0):
    """λ_max of ½ s² Σ d_i ω_i² is s² max d, whose derivative is 2s max d, forwards and backwards, compiled and not."""
    scales = jnp.array([1.0, 3.0, 2.0])

    def largest(s):
        loss = lambda p, batch: jnp.mean(batch) * s**2 * jnp.sum(scales * p**2) / 2
        start = None if v0 is None else jnp.array(v0)
        return curvature.sharpness(loss, jnp.ones(3), jnp.ones(4), key=KEY, tol=1e-10, v0=start).value

    forwards = lambda s: jax.jvp(largest, (s,), (1.0,))[1]
    for derivative in (jax.grad(largest), forwards, jax.jit(jax.grad(largest)), jax.jit(forwards)):
        np.testing.assert_allclose(derivative(0.7), 2 * 0.7 * 3, rtol=1e-8)
    np.testing.assert_allclose(jax.vmap(largest)(jnp.array([0.7, 2.0])), [0.49 * 3, 12.0], rtol=1e-8)


def test_the_gradient_of_several_eigenvalues_by_the_matrix_itself(x64):
    a = np.random.default_rng(0).normal(size=(12, 12))
    a = jnp.asarray(a + a.T)

    def values(a):
        op = curvature.LinearOperator(dense_product, curvature.Space.of(jnp.zeros(12)), a)
        return curvature.eigsh(op, 3, key=KEY, tol=1e-13).values

    weights = jnp.array([1.0, -2.0, 0.5])
    ours = jax.grad(lambda a: weights @ values(a))(a)
    dense = jax.grad(lambda a: weights @ jnp.linalg.eigvalsh(a)[::-1][:3])(a)
    np.testing.assert_allclose(ours + ours.T, dense + dense.T, rtol=1e-6, atol=1e-9)
    tangent = jnp.eye(12)
    np.testing.assert_allclose(jax.jvp(values, (a,), (tangent,))[1], 1.0, rtol=1e-9)


def test_flat_and_broken_losses_come_back_as_data():
    flat = curvature.sharpness(lambda p, b: 0 * p.sum() * b.mean(), jnp.ones(5), jnp.ones(2), key=KEY)
    assert flat.value == 0
    assert bool(flat.converged)
    ones, nan = jnp.ones((1, 5)), jnp.nan
    only_the_loss = lambda p, b: diagonal_loss(p, b) + jnp.log(-b.mean())
    for loss, params, batch in (
        (diagonal_loss, jnp.zeros(5), nan * ones),
        (diagonal_loss, jnp.full(5, nan), ones),
        (diagonal_loss, jnp.full(5, jnp.inf), ones),
        (only_the_loss, jnp.zeros(5), ones),
    ):
        broken = curvature.sharpness(loss, params, batch, key=KEY)
        assert np.isnan(broken.value)
        assert np.isnan(broken.upper_bound)
        assert not bool(broken.converged)


def test_a_subsamples_eigenvector_saves_products():
    batch, params = 1 + 0.1 * jax.random.normal(KEY, (400, 60)), jnp.zeros(60)
    batch = batch * jnp.linspace(0.1, 1, 60) ** 2
    cold = curvature.sharpness(diagonal_loss, params, batch, key=KEY)
    warm = curvature.sharpness(diagonal_loss, params, batch, key=KEY, subsample=100)
    np.testing.assert_allclose(warm.value, batch.mean(axis=0).max(), rtol=1e-3)
    assert int(warm.num_matvecs) < int(cold.num_matvecs)
    assert np.isnan(warm.upper_bound)


def test_the_sampling_error_is_that_of_other_samples():
    """vᵀH_n v of a diagonal Hessian is the example's own top entry: compare with the spread over 300 fresh samples."""
    draw = lambda key: jnp.array([2.0, 1.0, 0.5]) * (1 + 0.4 * jax.random.normal(key, (50, 3)))
    one = lambda key: curvature.sharpness(diagonal_loss, jnp.zeros(3), draw(key), key=KEY, sampling_error=True)
    found = jax.lax.map(one, jax.random.split(KEY, 300))
    np.testing.assert_allclose(found.sampling_error.mean(), found.value.std(), rtol=0.1)
    assert np.isnan(curvature.sharpness(diagonal_loss, jnp.zeros(3), draw(KEY), key=KEY).sampling_error)


def test_a_second_call_with_new_params_and_batch_traces_nothing():
    calls, counts = [], []

    def loss(params, batch):
        calls.append(1)
        return diagonal_loss(params, batch)

    for scale in (1.0, 2.0, 3.0):
        found = curvature.sharpness(loss, scale * jnp.ones(30), scale * jnp.linspace(0, 1, 30)[None], key=KEY)
        np.testing.assert_allclose(found.value, scale, rtol=2e-3)
        counts.append(len(calls))
    assert counts[0] == counts[-1] > 0


def test_one_program_of_one_size_however_many_layers_are_scanned():
    def loss(params, batch):
        return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, params)[0] ** 2)

    find = jax.jit(lambda params, batch: curvature.sharpness(loss, params, batch, key=KEY).value)
    sizes = [len(find.lower(jnp.ones((n, 4, 4)), jnp.ones((3, 4))).as_text().splitlines()) for n in (2, 8)]
    assert sizes[0] == sizes[1]


def test_bad_arguments():
    for tol in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="tol: expected a positive number"):
            curvature.sharpness(diagonal_loss, jnp.ones(3), jnp.ones((1, 3)), key=KEY, tol=tol)
    for probability in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="failure_probability"):
            curvature.sharpness(diagonal_loss, jnp.ones(3), jnp.ones((1, 3)), key=KEY, failure_probability=probability)
    with pytest.raises(ValueError, match="subsample: expected 1 to 1"):
        curvature.sharpness(diagonal_loss, jnp.ones(3), jnp.ones((1, 3)), key=KEY, subsample=2)
    with pytest.raises(ValueError, match="one of the two"):
        curvature.sharpness(diagonal_loss, jnp.ones(3), jnp.ones((1, 3)), key=KEY, subsample=1, v0=jnp.ones(3))
    with pytest.raises(ValueError, match=r"loss: expected a real scalar, .* got shape \(3,\)"):
        curvature.sharpness(lambda p, b: p**2 * b.mean(), jnp.ones(3), jnp.ones((1, 3)), key=KEY)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_params_in_half_precision_are_certified_as_the_same_numbers_in_float32(dtype):
    model = nn.mlp([16, 3])
    batch = (jax.random.normal(KEY, (60, 5)), jnp.arange(60) % 3)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    params = jax.tree.map(lambda x: x.astype(dtype), model.init(KEY, (5,)))
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    top = np.linalg.eigvalsh(np.asarray(curvature.materialize(curvature.hessian(loss, rounded, batch)), np.float64))[-1]
    for inputs in (batch[0], batch[0].astype(dtype)):
        exact = inputs.astype(jnp.float32)
        dense = curvature.materialize(curvature.hessian(loss, rounded, (exact, batch[1])))
        top = np.linalg.eigvalsh(np.asarray(dense, np.float64))[-1]
        for seed in range(5):
            found = curvature.sharpness(loss, params, (inputs, batch[1]), key=jax.random.key(seed))
            assert found.converged
            assert found.upper_bound >= top * (1 - 1e-6)
            np.testing.assert_allclose(found.value, top, rtol=1e-3)
    # Of a loss that rounds by itself nothing is certified.
    half = lambda p, b: loss(jax.tree.map(lambda x: x.astype(dtype), p), (b[0].astype(dtype), b[1])).astype(jnp.float32)
    found = curvature.sharpness(half, rounded, batch, key=KEY)
    assert jnp.isnan(found.upper_bound)


@pytest.mark.parametrize("margin", [5, 8, 12])
def test_rounding_of_a_loss_that_is_all_but_zero_is_in_the_bound_and_the_verdict(all_but_certain, margin):
    loss, params, batch, true = all_but_certain(margin)
    for seed in range(5):
        found = curvature.sharpness(loss, params, batch, key=jax.random.key(seed))
        assert found.upper_bound >= true
        assert abs(found.value - true) <= found.product_error + 1e-3 * true
        assert found.converged == (margin < 10)
        warm = curvature.sharpness(loss, params, batch, v0=found.leading, key=jax.random.key(seed))
        assert abs(warm.value - true) <= 2 * warm.product_error + 1e-3 * true
        assert warm.converged == (margin < 10)


def test_where_rounding_is_as_large_as_the_value_nothing_is_certified(all_but_certain):
    loss, params, batch, true = all_but_certain(20)
    for seed in range(5):
        found = curvature.sharpness(loss, params, batch, key=jax.random.key(seed))
        assert not found.converged
        assert jnp.isnan(found.upper_bound) | (found.upper_bound >= true)


def test_a_space_that_is_exhausted_is_no_excuse_for_rounding():
    """Two inputs and two classes, at labels that are certain: all products are made, and all are rounded."""
    x = jnp.array([[1, 0.3], [0.2, 1], [-1, -0.5], [-0.4, -1]])
    loss = losses.mean_loss(lambda p, x: x @ p, losses.softmax_cross_entropy)
    for scale, told in ((1.0, True), (10.0, False)):
        params = scale * jnp.array([[1.0, -1.0], [1.0, -1.0]])
        found = curvature.sharpness(loss, params, (x, jnp.array([0, 0, 1, 1])), key=KEY)
        assert found.converged == told
        assert jnp.isnan(found.upper_bound) != told
