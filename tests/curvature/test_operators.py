import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import curvature, data, losses, nn
from jaxnet.curvature import LinearOperator, Space, flattened


def dense_hessian(loss, params, batch):
    flat, unravel = ravel_pytree(params)
    return jax.jit(jax.hessian(lambda w: loss(unravel(w), batch)))(flat)


def test_hessian_of_an_mlp_is_dense_autodiffs(mlp_problem):
    op = curvature.hessian(*mlp_problem)
    np.testing.assert_allclose(curvature.materialize(op), dense_hessian(*mlp_problem), rtol=1e-10, atol=1e-12)


def test_hessian_of_a_conv_net_is_dense_autodiffs(x64):
    model = nn.serial(nn.conv(2, 3), nn.activation(jnp.tanh), nn.max_pool(2), nn.avg_pool(2), nn.flatten(), nn.dense(3))
    params = model.init(jax.random.key(0), (8, 8, 1))
    batch = (jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.array([0, 1, 2, 0]))
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    op = curvature.hessian(loss, params, batch)
    np.testing.assert_allclose(curvature.materialize(op), dense_hessian(loss, params, batch), rtol=1e-9, atol=1e-11)


def test_softmax_regression_at_zero_has_the_known_top(x64):
    inputs, labels = data.digits(centre=False)
    model = nn.dense(10, use_bias=False)
    params = {"kernel": jnp.zeros((64, 10))}
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    top = np.linalg.eigvalsh(inputs.T @ inputs / len(inputs))[-1]
    found = curvature.sharpness(loss, params, (inputs, labels), key=jax.random.key(0), tol=1e-10)
    np.testing.assert_allclose(found.value, top / 10, rtol=1e-9)


def test_a_product_crosses_jit_and_vmap(mlp_problem):
    loss, params, batch = mlp_problem
    op = curvature.hessian(loss, params, batch)
    v = jax.tree.map(jnp.ones_like, params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), v)
    twice = jax.jit(jax.vmap(lambda op, v: op(v), in_axes=(None, 0)))(op, stacked)
    for index, factor in enumerate((1, 2)):
        expected = ravel_pytree(op(v))[0] * factor
        np.testing.assert_allclose(ravel_pytree(jax.tree.map(lambda x, i=index: x[i], twice))[0], expected, rtol=1e-9)


def test_a_vector_of_another_shape_is_refused(mlp_problem):
    with pytest.raises(ValueError, match="expected a pytree like params"):
        curvature.hessian(*mlp_problem)(jnp.ones(3))


def rows_of(loss, params, batch):
    """Each example's gradient by a loop, (N, n)."""
    gradient = jax.jit(jax.grad(loss))
    one = lambda i: ravel_pytree(gradient(params, jax.tree.map(lambda x: x[i : i + 1], batch)))[0]
    return np.stack([one(i) for i in range(len(batch[1]))])


def dense_gauss_newton(loss, params, batch):
    flat, unravel = ravel_pytree(params)
    outputs = loss.apply(params, batch[0])
    jacobian = jax.jit(jax.jacobian(lambda w: loss.apply(unravel(w), batch[0])))(flat)
    curvature_of = jax.hessian(lambda o, t: loss.criterion(o[None], t[None])[0])
    blocks = jax.vmap(curvature_of)(outputs, batch[1])
    return np.einsum("nki,nkl,nlj->ij", jacobian, blocks, jacobian) / len(outputs)


def attention(params, tokens):
    """Two causal heads over (N, T, d), averaged over T, to three classes."""
    split = lambda x: x.reshape(*x.shape[:2], 2, -1)
    q, k, v = (split(tokens @ params[name]) for name in ("q", "k", "v"))
    scores = jnp.einsum("nthd,nshd->nhts", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores), v)
    return mixed.reshape(*tokens.shape[:2], -1).mean(axis=1) @ params["out"]


def conv_problem():
    model = nn.serial(nn.conv(2, 3), nn.activation(jnp.tanh), nn.avg_pool(2), nn.flatten(), nn.dense(3))
    batch = (jax.random.normal(jax.random.key(1), (5, 6, 6, 1)), jnp.array([0, 1, 2, 0, 1]))
    return losses.mean_loss(model.apply, losses.softmax_cross_entropy), model.init(jax.random.key(0), (6, 6, 1)), batch


def attention_problem():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {name: jax.random.normal(k, (4, 4)) / 2 for name, k in zip("qkv", keys[:3], strict=True)}
    params["out"] = jax.random.normal(keys[3], (4, 3)) / 2
    batch = (jax.random.normal(keys[4], (5, 3, 4)), jnp.array([0, 1, 2, 0, 1]))
    return losses.mean_loss(attention, losses.softmax_cross_entropy), params, batch


@pytest.mark.parametrize("problem", [conv_problem, attention_problem])
def test_other_architectures_by_dense_autodiff(problem, x64):
    loss, params, batch = problem()
    close = lambda op, dense: np.testing.assert_allclose(curvature.materialize(op), dense, rtol=1e-8, atol=1e-12)
    close(curvature.hessian(loss, params, batch), dense_hessian(loss, params, batch))
    close(curvature.gauss_newton(loss, params, batch), dense_gauss_newton(loss, params, batch))
    # The Fisher draws labels: those very labels' gradients, by a loop.
    key = jax.random.key(3)
    drawn = jax.random.categorical(key, loss.apply(params, batch[0]))
    rows = rows_of(loss, params, (batch[0], drawn))
    close(curvature.fisher(loss, params, batch, key=key), rows.T @ rows / len(rows))


@pytest.mark.parametrize("size", [None, 5])
def test_gauss_newton_is_the_dense_one(mlp_problem, size):
    loss, params, batch = mlp_problem
    op = curvature.gauss_newton(losses.chunked(loss, size) if size else loss, params, batch)
    dense = np.asarray(curvature.materialize(op))
    np.testing.assert_allclose(dense, dense_gauss_newton(loss, params, batch), rtol=1e-9, atol=1e-12)
    assert np.linalg.eigvalsh(dense)[0] > -1e-12


def test_gauss_newton_of_a_linear_network_is_its_hessian(x64):
    model = nn.dense(3)
    params = model.init(jax.random.key(0), (4,))
    batch = (jax.random.normal(jax.random.key(1), (9, 4)), jnp.arange(9) % 3)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    np.testing.assert_allclose(
        curvature.materialize(curvature.gauss_newton(loss, params, batch)),
        curvature.materialize(curvature.hessian(loss, params, batch)),
        rtol=1e-9,
        atol=1e-13,
    )


@pytest.mark.parametrize(
    "criterion", [losses.softmax_cross_entropy, losses.squared_error, losses.sigmoid_cross_entropy]
)
def test_fisher_averages_to_gauss_newton(criterion, x64):
    model = nn.mlp([2, 3])
    params = model.init(jax.random.key(0), (2,))
    inputs = jax.random.normal(jax.random.key(1), (6, 2))
    targets = jnp.arange(6) % 3 if criterion is losses.softmax_cross_entropy else jnp.full((6, 3), 0.5)
    loss = losses.mean_loss(model.apply, criterion)
    one = lambda key: curvature.materialize(curvature.fisher(loss, params, (inputs, targets), key=key))
    draws = np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(2), 2000)))
    error = draws.std(axis=0) / 2000**0.5
    expected = dense_gauss_newton(loss, params, (inputs, targets))
    assert (np.abs(draws.mean(axis=0) - expected) <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("one_hot", [False, True])
def test_fisher_of_sequences_averages_to_gauss_newton(one_hot, x64):
    """A mean over positions is a share of a log-likelihood: by the trace, of which each draw's error is known."""
    model = nn.dense(3)
    params = model.init(jax.random.key(0), (2,))
    inputs = jax.random.normal(jax.random.key(1), (64, 6, 2))
    labels = jnp.arange(64 * 6).reshape(64, 6) % 3
    targets = jax.nn.one_hot(labels, 3) if one_hot else labels
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    one = lambda key: jnp.trace(curvature.materialize(curvature.fisher(loss, params, (inputs, targets), key=key)))
    draws = np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(2), 200)))
    logits = model.apply(params, inputs).reshape(-1, 3)
    p = np.asarray(jax.nn.softmax(logits))
    x = np.concatenate([np.asarray(inputs).reshape(-1, 2), np.ones((384, 1))], axis=1)
    expected = ((x**2).sum(axis=1) * (p * (1 - p)).sum(axis=1)).mean()
    assert abs(draws.mean() - expected) <= 4 * draws.std() / 200**0.5
    dense = curvature.materialize(curvature.gauss_newton(loss, params, (inputs, targets)))
    np.testing.assert_allclose(jnp.trace(dense), expected, rtol=1e-9)


def test_second_moments_of_gradients(mlp_problem):
    loss, params, batch = mlp_problem
    rows = rows_of(loss, params, batch)
    close = lambda op, dense: np.testing.assert_allclose(curvature.materialize(op), dense, rtol=1e-9, atol=1e-13)
    close(curvature.empirical_fisher(loss, params, batch), rows.T @ rows / len(rows))
    close(curvature.gradient_covariance(loss, params, batch), np.cov(rows.T))


def test_the_weights_block_of_the_lectures(x64):
    batch = data.two_gaussians_exact()
    neuron = nn.linear_neuron()
    loss = losses.mean_loss(neuron.apply, losses.squared_error)
    op = curvature.hessian(loss, neuron.init(jax.random.key(0), (2,)), batch)
    block = curvature.restrict(op, {"kernel": True, "bias": False})
    found = curvature.eigsh(block, 2, key=jax.random.key(0), tol=1e-12)
    np.testing.assert_allclose(found.values, [0.84, 0.04], atol=1e-13)
    assert found.vectors["bias"] is None


def test_blocks_sums_shifts_and_preconditioning_are_those_of_the_matrix(mlp_problem):
    loss, params, batch = mlp_problem
    op = curvature.hessian(loss, params, batch)
    dense = np.asarray(curvature.materialize(op))
    layer = [True, False, False]  # a prefix: the whole first layer
    mask = np.asarray(
        ravel_pytree(jax.tree.map(lambda k, p: jax.tree.map(lambda x: jnp.full(x.shape, k), p), layer, list(params)))[0]
    )
    block = curvature.materialize(curvature.restrict(op, tuple(layer)))
    np.testing.assert_allclose(block, dense[np.ix_(mask, mask)], rtol=1e-10, atol=1e-13)
    both = curvature.shift(op + curvature.gauss_newton(loss, params, batch), 0.3)
    expected = dense + dense_gauss_newton(loss, params, batch) + 0.3 * np.eye(len(dense))
    np.testing.assert_allclose(curvature.materialize(both), expected, rtol=1e-9, atol=1e-12)
    diagonal = jax.tree.map(lambda x: 0.5 + jnp.square(x), params)
    p = np.asarray(ravel_pytree(diagonal)[0])
    found = curvature.eigsh(curvature.precondition(op, diagonal), key=jax.random.key(0), tol=1e-10)
    np.testing.assert_allclose(found.values[0], np.linalg.eigvals(dense / p[:, None]).real.max(), rtol=1e-8)


def test_operators_of_equal_losses_share_a_compilation(mlp_problem):
    loss, params, batch = mlp_problem
    mask = jax.tree.map(lambda x: x.ndim == 2, params)
    make = lambda: curvature.shift(curvature.restrict(curvature.hessian(loss, params, batch), mask), 1.0)
    assert jax.tree.structure(make()) == jax.tree.structure(make())


def test_bad_operators(mlp_problem):
    loss, params, batch = mlp_problem
    op = curvature.hessian(loss, params, batch)
    own = losses.mean_loss(loss.apply, lambda o, t: losses.softmax_cross_entropy(o, t))
    with pytest.raises(TypeError, match="mean_loss"):
        curvature.gauss_newton(lambda p, b: loss(p, b), params, batch)
    with pytest.raises(TypeError, match="known negative log-likelihood"):
        curvature.fisher(own, params, batch, key=jax.random.key(0))
    with pytest.raises(ValueError, match="at least one leaf"):
        curvature.restrict(op, jax.tree.map(lambda x: False, params))
    with pytest.raises(ValueError, match="mask: expected"):
        curvature.restrict(op, {"kernel": True})
    with pytest.raises(ValueError, match="diagonal"):
        curvature.precondition(op, params[0])
    with pytest.raises(ValueError, match="same structure"):
        op + curvature.restrict(op, jax.tree.map(lambda x: x.ndim == 2, params))
    with pytest.raises(ValueError, match="2 examples"):
        curvature.gradient_covariance(loss, params, jax.tree.map(lambda x: x[:1], batch))


def test_the_algebra_is_that_of_the_dense_matrices(mlp_problem):
    loss, params, batch = mlp_problem
    a, b = (make(loss, params, batch) for make in (curvature.hessian, curvature.empirical_fisher))
    dense_a, dense_b = map(curvature.materialize, (a, b))
    for op, expected in (
        (a + b, dense_a + dense_b),
        (a - b, dense_a - dense_b),
        (-a, -dense_a),
        (2 * a, 2 * dense_a),
        (a * 2, 2 * dense_a),
        (np.float64(0.5) * a, dense_a / 2),
        (jnp.array(0.5) * a - 3 * (b - a), dense_a / 2 - 3 * (dense_b - dense_a)),
        (curvature.shift(2 * a, 0.1), 2 * dense_a + 0.1 * np.eye(len(dense_a))),
    ):
        np.testing.assert_allclose(curvature.materialize(op), expected, atol=1e-12)
    np.testing.assert_array_equal(ravel_pytree(a @ params)[0], ravel_pytree(a(params))[0])
    for wrong in (lambda: a * a, lambda: [1.0, 2.0] * a, lambda: jnp.ones(3) * a, lambda: 1j * a, lambda: a + 1):
        with pytest.raises(TypeError):
            wrong()


def test_a_new_factor_compiles_nothing(mlp_problem):
    loss, params, batch = mlp_problem
    traced = []

    def counted(params, batch):
        traced.append(1)
        return loss(params, batch)

    op = curvature.hessian(counted, params, batch)
    first = curvature.eigsh(2.0 * op, key=jax.random.key(0))
    once = len(traced)
    second = curvature.eigsh(4.0 * op, key=jax.random.key(0))
    assert len(traced) == once
    np.testing.assert_allclose(second.values, 2 * first.values, rtol=1e-10)


class Weights:
    """Params of a class of one's own, whose instances are equal only to themselves."""

    def __init__(self, w, b):
        self.w, self.b = w, b


jax.tree_util.register_pytree_node(Weights, lambda p: ((p.w, p.b), None), lambda _, children: Weights(*children))


def test_params_of_a_class_that_compares_by_identity(x64):
    """½ mean (x·w + b)² has the Hessian of the rows (x, 1)."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))
    params = Weights(jnp.ones(3), jnp.zeros(()))
    loss = lambda p, batch: jnp.mean((batch @ p.w + p.b) ** 2) / 2
    rows = np.append(x, np.ones((7, 1)), axis=1)
    op = curvature.hessian(loss, params, x)
    fisher = curvature.empirical_fisher(loss, params, x)
    np.testing.assert_allclose(curvature.materialize(op + fisher - fisher), rows.T @ rows / 7, rtol=1e-12)
    halved = curvature.precondition(op, jax.tree.map(lambda p: jnp.full_like(p, 4.0), params))
    top = np.linalg.eigvalsh(rows.T @ rows / 7)[-1]
    np.testing.assert_allclose(curvature.eigsh(halved, key=jax.random.key(0), tol=1e-10).values[0], top / 4)
    np.testing.assert_allclose(curvature.sharpness(loss, params, x, key=jax.random.key(0), tol=1e-10).value, top)


def test_a_mask_is_a_pytree_of_bools(mlp_problem):
    op = curvature.hessian(*mlp_problem)
    for mask in (lambda *_: False, 1, b"kernel", jax.tree.map(lambda x: 1.0, mlp_problem[1])):
        with pytest.raises(TypeError, match="mask: expected bools"):
            curvature.restrict(op, mask)


def test_params_that_are_not_finite_have_no_curvature():
    """Also where the Hessian does not read them."""
    found = curvature.eigsh(
        curvature.hessian(lambda p, b: jnp.sum(p**2), jnp.array([1.0, jnp.nan]), jnp.ones(3)), key=jax.random.key(2)
    )
    assert jnp.isnan(found.values[0])
    assert not found.converged


def test_the_memory_of_a_chunked_fisher_does_not_grow_with_the_examples():
    """Beside the examples themselves, of which a scan over chunks keeps a copy."""
    model = nn.serial(nn.conv(4, 3), nn.activation(jnp.tanh), nn.flatten(), nn.dense(3))
    params = model.init(jax.random.key(0), (12, 12, 1))
    loss = losses.chunked(losses.mean_loss(model.apply, losses.softmax_cross_entropy), 50)

    def needed(n):
        batch = jax.random.normal(jax.random.key(1), (n, 12, 12, 1)), jnp.arange(n) % 3
        op = curvature.fisher(loss, params, batch, key=jax.random.key(2))
        compiled = jax.jit(lambda op, v: op @ v).lower(op, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes - batch[0].nbytes

    # Few are held whole, by their factors; of many a chunk at a time: those of 2000 more would take 30 MB.
    assert needed(4000) - needed(2000) < 2**20


@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_flat_vector_is_cut_where_its_leaves_begin(lead, x64):
    rng = np.random.default_rng(0)
    draw = lambda dtype, *shape: jnp.asarray(rng.normal(size=(*lead, *shape)), dtype)
    tree = {
        "a": draw(jnp.float32, 2, 3),
        "b": draw(jnp.float64, 4),
        "c": None,
        "d": (draw(jnp.float32), draw(jnp.float32, 0)),
    }
    space = Space.of(jax.tree.map(lambda x: x[0] if lead else x, tree))
    ravel = jax.vmap(space.ravel) if lead else space.ravel
    flat = ravel(tree)
    assert [x.shape for x in flat] == [(*lead, *shape) for shape in space.flat.shapes]
    assert [x.dtype for x in flat] == list(space.flat.dtypes)
    for found in (space.unravel(flat), jax.jit(space.unravel)(flat, space.starts)):
        chex.assert_trees_all_equal(found, tree)


def test_where_leaves_begin_is_an_argument_and_no_constant():
    """As constants they make a kernel for each leaf, and for what each is a part of."""
    tree = [jnp.ones((3, 2)) for _ in range(5)]
    op = LinearOperator(lambda scale, v: jax.tree.map(lambda x: scale * x, v), Space.of(tree), jnp.asarray(2.0))
    flat = flattened(op)
    program = jax.jit(lambda op, v: op @ v).lower(flat, op.space.ravel(tree)).compile().as_text()
    sliced = [line for line in program.splitlines() if re.search(r" (dynamic-)?slice\(", line)]
    assert sliced
    assert all("dynamic-slice(" in line for line in sliced)
