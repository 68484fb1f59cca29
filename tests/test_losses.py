import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jaxnet import curvature, losses, nn, per_example, training

KEY = jax.random.key(0)


def logits_and_labels(seed, n, c):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, c)) * 5, rng.integers(0, c, n)


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 6))
def test_softmax_cross_entropy_is_the_written_sum(seed, n, c):
    z, y = logits_and_labels(seed, n, c)
    written = -scipy.special.log_softmax(z, axis=1)[np.arange(n), y]
    np.testing.assert_allclose(
        losses.softmax_cross_entropy(jnp.asarray(z), jnp.asarray(y)), written, rtol=2e-5, atol=2e-6
    )
    one_hot = jnp.asarray(np.eye(c)[y])
    np.testing.assert_allclose(losses.softmax_cross_entropy(jnp.asarray(z), one_hot), written, rtol=2e-5, atol=2e-6)


def test_cross_entropy_in_bits_of_two_four_and_eight_classes():
    for c, bits in ((1, 0), (2, 1), (4, 2), (8, 3)):
        value = losses.softmax_cross_entropy(jnp.zeros((1, c)), jnp.zeros(1, jnp.int32))[0] / np.log(2)
        np.testing.assert_allclose(value, bits, atol=1e-6)


@pytest.mark.parametrize("bad", [-1, 3, 100])
def test_a_label_out_of_range_is_nan_and_not_another_class(bad):
    loss = lambda z: losses.softmax_cross_entropy(z, jnp.array([0, bad])).mean()
    z = jnp.zeros((2, 3))
    each = losses.softmax_cross_entropy(z, jnp.array([0, bad]))
    assert np.isfinite(each[0])
    assert np.isnan(each[1])
    assert np.isnan(jax.grad(loss)(z)[1]).all()


def test_labels_beyond_32_bits_do_not_wrap(x64):
    values = losses.softmax_cross_entropy(jnp.zeros((3, 3)), jnp.array([2**32, 1 - 2**32, 1]))
    assert np.isnan(values).tolist() == [True, True, False]


def test_signs_are_no_probabilities():
    values = losses.sigmoid_cross_entropy(jnp.zeros(4), jnp.array([-1.0, 1.0, 0.0, 3.0]))
    assert np.isnan(values).tolist() == [True, False, False, True]


def test_a_criterion_must_keep_the_examples_apart():
    loss = losses.mean_loss(lambda p, x: x, lambda o, t: jnp.mean((o - t) ** 2))
    with pytest.raises(ValueError, match=r"one value an example, \(6,\), got \(\)"):
        loss(None, (jnp.ones((6, 1)), jnp.ones(6)))


def test_sigmoid_cross_entropy_is_the_lectures_formula_and_finite_at_the_ends():
    z, y = jnp.array([-3.0, 0.2, 4.0]), jnp.array([0.0, 1.0, 1.0])
    p = 1 / (1 + np.exp(-np.asarray(z, np.float64)))
    written = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    np.testing.assert_allclose(losses.sigmoid_cross_entropy(z, y), written, rtol=1e-5)
    extreme = lambda z: losses.sigmoid_cross_entropy(z, jnp.array([0.0, 1.0, 0.0, 1.0])).mean()
    value, grad = jax.value_and_grad(extreme)(jnp.array([-500.0, -500.0, 500.0, 500.0]))
    np.testing.assert_allclose(value, 250.0)
    assert np.isfinite(grad).all()


def test_squared_error_sums_over_the_example():
    o, t = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(losses.squared_error(o, t), [2.5, 12.5])
    np.testing.assert_allclose(losses.squared_error(o[:, 0], t[:, 0]), [0.5, 4.5])


@pytest.mark.parametrize(
    "criterion", [losses.squared_error, losses.sigmoid_cross_entropy, losses.softmax_cross_entropy]
)
def test_no_silent_broadcast(criterion):
    with pytest.raises(ValueError, match=criterion.__name__):
        criterion(jnp.ones((4, 1)), jnp.ones(4))
    with pytest.raises(ValueError, match=criterion.__name__):
        criterion(jnp.float32(1.0), jnp.float32(1.0))


def test_positions_of_a_sequence_are_averaged():
    z, y = jax.random.normal(jax.random.key(0), (2, 5, 3)), jnp.array([[0, 1, 2, 0, 1], [2, 2, 2, 0, 0]])
    rows = [losses.softmax_cross_entropy(z[n], y[n]).mean() for n in range(2)]
    np.testing.assert_allclose(losses.softmax_cross_entropy(z, y), jnp.stack(rows), rtol=1e-6)


def test_equal_losses_share_one_compilation():
    make = lambda: losses.mean_loss(nn.mlp([3, 2]).apply, losses.squared_error)
    assert make() == make()
    assert hash(make()) == hash(make())
    batch = (jnp.ones((4, 3)), jnp.ones((4, 2)))
    params = nn.mlp([3, 2]).init(jax.random.key(0), (3,))
    step = jax.jit(chex.assert_max_traces(lambda loss, p, b: loss(p, b), n=1), static_argnums=0)
    step(make(), params, batch)
    step(make(), params, batch)


def test_dropout_draws_for_each_example_from_the_batchs_keys():
    model = nn.serial(nn.dense(50), nn.dropout(0.5), nn.dense(1))
    params = model.init(jax.random.key(0), (3,))
    loss = losses.mean_loss(model.apply, losses.squared_error)
    inputs, targets, keys = jnp.ones((2, 3)), jnp.zeros((2, 1)), jax.random.split(jax.random.key(1), 2)
    out = loss.outputs(params, (inputs, targets, keys))
    assert out[0] != out[1]
    alone = loss.outputs(params, (inputs[1:], targets[1:], keys[1:]))
    np.testing.assert_allclose(out[1:], alone, rtol=1e-6)
    np.testing.assert_allclose(loss(params, (inputs, targets)), loss(params, (inputs, targets)))


@pytest.mark.parametrize("size", [1, 4, 5, 12, 100])
def test_chunks_give_the_same_mean_gradient_and_hessian_product(size, mlp_problem):
    loss, params, batch = mlp_problem
    parts = losses.chunked(loss, size)
    assert parts == losses.chunked(loss, size)
    np.testing.assert_allclose(parts(params, batch), loss(params, batch), rtol=1e-14)
    v = jax.tree.map(jnp.cos, params)
    product = lambda f: jax.jvp(jax.grad(lambda p: f(p, batch)), (params,), (v,))
    chex.assert_trees_all_close(jax.jit(product, static_argnums=0)(parts), product(loss), rtol=1e-11, atol=1e-14)


def test_chunks_bound_the_memory_of_a_hessian_product():
    model = nn.mlp([64, 64, 1])
    loss = losses.mean_loss(model.apply, losses.squared_error)
    params = model.init(jax.random.key(0), (16,))

    def temporary(f, n):
        batch = (jax.ShapeDtypeStruct((n, 16), jnp.float32), jax.ShapeDtypeStruct((n, 1), jnp.float32))
        product = lambda p, b: jax.jvp(jax.grad(lambda p: f(p, b)), (p,), (p,))[1]
        return jax.jit(product).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(loss, 16000) > 5 * temporary(loss, 2000)
    chunked = losses.chunked(loss, 100)
    assert temporary(chunked, 16000) < 1.1 * temporary(chunked, 2000) + 16000 * 4


def test_a_single_chunk_is_not_computed_twice(mlp_problem):
    loss, params, batch = mlp_problem
    of = lambda f: str(jax.make_jaxpr(jax.grad(lambda p: f(p, batch)))(params))
    assert "remat" in of(losses.chunked(loss, 5)) or "checkpoint" in of(losses.chunked(loss, 5))
    assert of(losses.chunked(loss, 12)) == of(loss)


def test_a_chunk_has_a_size():
    with pytest.raises(ValueError, match="size: expected 1 or more"):
        losses.chunked(lambda p, b: p, 0)


def test_accuracy_counts_hits():
    apply = lambda params, x: x
    z = jnp.array([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    np.testing.assert_allclose(losses.accuracy(apply, None, (z, jnp.array([0, 1, 1]))), 2 / 3)
    np.testing.assert_allclose(losses.accuracy(apply, None, (z, jax.nn.one_hot(jnp.array([0, 1, 1]), 2))), 2 / 3)
    with pytest.raises(ValueError, match=r"labels \(N,\)"):
        losses.accuracy(apply, None, (z, jnp.array([[0], [1], [1]])))
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        losses.accuracy(apply, None, (z[:, 0], jnp.array([0, 1, 1])))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint16, bool])
def test_narrow_labels_are_compared_in_full(dtype):
    """Byte-level text: 256 classes do not fit the labels' own type."""
    found = losses.softmax_cross_entropy(jnp.zeros((2, 256)), jnp.array([0, 1], dtype))
    np.testing.assert_allclose(found, np.log(256), rtol=1e-6)


@pytest.mark.parametrize("kind", ["mean_loss", "chunked", "a function"])
def test_mixed_precision_rounds_the_computation_and_keeps_the_rest(kind, mlp_problem):
    """The value is the network's on rounded numbers; what is held stays in the params' precision."""
    loss, params, batch = mlp_problem
    low = losses.mixed_precision(
        {"chunked": losses.chunked(loss, 5), "a function": lambda p, b: loss(p, b)}.get(kind, loss), jnp.bfloat16
    )
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    expected = loss(half, (batch[0].astype(jnp.bfloat16), batch[1]))
    value, gradient = jax.value_and_grad(low)(params, batch)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, expected, rtol=0.01)
    assert kind == "a function" or value != jnp.asarray(value, jnp.bfloat16)  # the mean is not rounded
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
    chex.assert_trees_all_close(gradient, jax.grad(loss)(params, batch), atol=0.02)
    chex.assert_trees_all_equal_shapes_and_dtypes(per_example.gradients(low, params, batch).norms(), jnp.zeros(12))
    step = training.fit(low, params, batch, optax.adam, learning_rate=0.01, batch_size=4, num_epochs=1, key=KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(step.state, training.init_state(params, optax.adam(0.01)))
    true, found = (curvature.sharpness(f, params, batch, key=KEY, tol=0.01) for f in (losses.chunked(loss, 5), low))
    np.testing.assert_allclose(found.value, true.value, rtol=0.05)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.vector, params)
    assert np.isnan(found.upper_bound)


def test_losses_of_equal_precision_are_equal(mlp_problem):
    loss = mlp_problem[0]
    assert losses.mixed_precision(loss) == losses.mixed_precision(loss, "bfloat16")
    assert losses.mixed_precision(loss) != losses.mixed_precision(loss, jnp.float16)
    with pytest.raises(TypeError, match="expected a floating dtype, got int32"):
        losses.mixed_precision(loss, jnp.int32)
