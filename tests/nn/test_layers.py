import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxnet import nn

KEY = jax.random.key(0)


def test_dense_is_an_affine_map():
    layer = nn.dense(3)
    params = layer.init(KEY, (4,))
    chex.assert_shape(params["kernel"], (4, 3))
    chex.assert_shape(params["bias"], (3,))
    x = jax.random.normal(KEY, (2, 5, 4))
    np.testing.assert_allclose(
        layer.apply(params, x),
        np.einsum("nti,io->nto", x, params["kernel"]) + params["bias"],
        rtol=1e-5,
        atol=1e-6,
    )
    assert set(nn.dense(3, use_bias=False).init(KEY, (4,))) == {"kernel"}


def test_dense_starts_at_variance_one_over_inputs():
    kernel = nn.dense(400).init(KEY, (100,))["kernel"]
    np.testing.assert_allclose(kernel.var(), 1 / 100, rtol=0.03)


@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["SAME", "VALID"]),
    st.integers(4, 9), st.integers(4, 9),
)  # fmt: skip
def test_conv_is_xlas_convolution(kh, kw, sh, sw, padding, height, width):
    layer = nn.conv(3, (kh, kw), strides=(sh, sw), padding=padding)
    params = layer.init(KEY, (height, width, 2))
    x = jax.random.normal(KEY, (2, height, width, 2))
    expected = lax.conv_general_dilated(
        x,
        params["kernel"],
        (sh, sw),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    got = layer.apply(params, x)
    chex.assert_shape(got, expected.shape)
    np.testing.assert_allclose(got, expected + params["bias"], rtol=1e-5, atol=1e-5)


def test_conv_gradients_are_xlas():
    layer = nn.conv(3, 3, strides=2)
    params = layer.init(KEY, (7, 6, 2))
    x = jax.random.normal(KEY, (2, 7, 6, 2))

    def reference(p, x):
        y = lax.conv_general_dilated(x, p["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.sin(y + p["bias"]))

    ours = jax.grad(lambda p, x: jnp.sum(jnp.sin(layer.apply(p, x))), (0, 1))(params, x)
    chex.assert_trees_all_close(ours, jax.grad(reference, (0, 1))(params, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 6, 3), (7, 5, 1)])
@pytest.mark.parametrize("window", [2, 3, (1, 2)])
def test_pools_are_xlas_windows(shape, window):
    x = jax.random.normal(KEY, (2, *shape))
    kh, kw = (window, window) if isinstance(window, int) else window
    dims = (1, kh, kw, 1)
    top = lax.reduce_window(x, -jnp.inf, lax.max, dims, dims, "VALID")
    mean = lax.reduce_window(x, 0.0, lax.add, dims, dims, "VALID") / (kh * kw)
    np.testing.assert_allclose(nn.max_pool(window).apply((), x), top, rtol=1e-6)
    np.testing.assert_allclose(nn.avg_pool(window).apply((), x), mean, rtol=1e-5, atol=1e-6)


def test_layer_norm_normalises_each_example():
    layer = nn.layer_norm()
    params = layer.init(KEY, (50,))
    y = layer.apply(params, 3 + 2 * jax.random.normal(KEY, (4, 50)))
    np.testing.assert_allclose(y.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(axis=1), 1, rtol=1e-4)
    y = layer.apply({"scale": 2 * params["scale"], "bias": params["bias"] + 1}, jax.random.normal(KEY, (4, 50)))
    np.testing.assert_allclose(y.mean(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 6), (6,)])
@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_group_norm_normalises_each_group_of_each_example(x64, shape, num_groups):
    layer = nn.group_norm(num_groups, epsilon=1e-3)
    x, scale, bias = (np.random.default_rng(s).normal(2, 3, size) for s, size in enumerate([(2, *shape), 6, 6]))
    expected = np.empty_like(x)
    for n in range(2):
        for channels in np.split(np.arange(6), num_groups):
            group = x[n][..., channels]
            unit = (group - np.mean(group)) / np.sqrt(np.var(group) + 1e-3)
            expected[n][..., channels] = scale[channels] * unit + bias[channels]
    got = layer.apply({"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}, jnp.asarray(x))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    chex.assert_trees_all_equal(layer.init(KEY, shape), {"scale": jnp.ones(6), "bias": jnp.zeros(6)})


def test_dropout_keeps_the_mean_and_is_the_identity_without_a_key():
    x = jnp.ones((1, 20000))
    layer = nn.dropout(0.25)
    np.testing.assert_array_equal(layer.apply((), x), x)
    y = layer.apply((), x, key=KEY)
    assert set(np.unique(y).tolist()) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(y.mean(), 1, atol=0.02)


def test_serial_is_composition_and_gives_each_layer_its_own_key():
    model = nn.serial(nn.dense(4), nn.activation(jnp.tanh), nn.dropout(0.5), nn.dropout(0.5), nn.flatten())
    params = model.init(KEY, (3,))
    assert len(params) == 5
    x = jnp.ones((2, 3))
    np.testing.assert_allclose(model.apply(params, x), jnp.tanh(x @ params[0]["kernel"]), rtol=1e-6)
    twice = nn.serial(nn.dropout(0.5), nn.dropout(0.5)).apply(((), ()), jnp.ones((1, 2000)), key=KEY)
    np.testing.assert_allclose((twice == 0).mean(), 0.75, atol=0.05)


def test_residual_adds_and_refuses_another_shape():
    inner = nn.dense(3)
    layer = nn.residual(inner)
    params, x = layer.init(KEY, (3,)), jnp.ones((2, 3))
    np.testing.assert_allclose(layer.apply(params, x), x + inner.apply(params, x))
    with pytest.raises(ValueError, match="keep the shape"):
        nn.residual(nn.dense(4)).apply(nn.dense(4).init(KEY, (3,)), x)


def test_equal_networks_are_the_same_network():
    assert nn.mlp([3, 2], activation=jnp.sin) is nn.mlp((3, 2), activation=jnp.sin)
    assert nn.dense(3) is nn.dense(features=3) is nn.dense(3, use_bias=True)
    assert nn.max_pool(np.int64(2)).apply((), jnp.ones((1, 4, 4, 1))).shape == (1, 2, 2, 1)
    assert nn.lenet(10).apply is not nn.lenet(5).apply
    assert nn.conv(3, [2, 2]).init(KEY, (4, 4, 1))["kernel"].shape == (2, 2, 1, 3)


def test_lenet_is_lenet():
    model = nn.lenet(10)
    params = model.init(KEY, (28, 28, 1))
    assert sum(x.size for x in jax.tree.leaves(params)) == 61706
    chex.assert_shape(model.apply(params, jnp.zeros((2, 28, 28, 1))), (2, 10))


def test_linear_neuron_meets_targets_of_its_shape():
    neuron = nn.linear_neuron()
    params = neuron.init(KEY, (2,))
    chex.assert_shape(neuron.apply(params, jnp.ones((5, 2))), (5,))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.dense(0), "features >= 1"),
        (lambda: nn.dense(2).init(KEY, ()), "at least one axis"),
        (lambda: nn.dense(2).apply(nn.dense(2).init(KEY, (3,)), jnp.ones((1, 4))), r"\(N, ..., 3\)"),
        (lambda: nn.conv(0), "features >= 1"),
        (lambda: nn.conv(2, 0), "positive sizes"),
        (lambda: nn.conv(2, padding="same"), '"SAME" or "VALID"'),
        (lambda: nn.conv(2).init(KEY, (8, 8)), "images"),
        (lambda: nn.conv(2, 9, padding="VALID").init(KEY, (8, 8, 1)), "larger than the image"),
        (lambda: nn.conv(2).apply(nn.conv(2).init(KEY, (8, 8, 1)), jnp.ones((1, 8, 8, 3))), "1 channels"),
        (lambda: nn.max_pool(9).apply((), jnp.ones((1, 8, 8, 1))), "larger than the image"),
        (lambda: nn.layer_norm().init(KEY, ()), "at least one axis"),
        (lambda: nn.layer_norm().apply(nn.layer_norm().init(KEY, (1,)), jnp.ones((2, 3))), r"\(N, ..., 1\)"),
        (lambda: nn.group_norm(0), "num_groups >= 1"),
        (lambda: nn.group_norm(4).init(KEY, (8, 8, 6)), "group_norm: .* divide the channels, got 4 and 6"),
        (lambda: nn.group_norm(4).apply(nn.group_norm(2).init(KEY, (6,)), jnp.ones((4, 6))), "got 4 and 6"),
        (lambda: nn.dropout(1.0), r"\[0, 1\)"),
        (lambda: nn.mlp([]), "at least one width"),
    ],
)
def test_bad_shapes_say_what_was_expected(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("key", [None, KEY])
def test_remat_keeps_the_inputs_of_its_layers_alone(key):
    """The pullback holds what the backward pass reads."""
    block = nn.residual(nn.serial(nn.dense(7), nn.activation(jnp.tanh), nn.dropout(0.5), nn.dense(5)))
    plain, remat = nn.serial(block, block, block), nn.serial(*[nn.remat(block)] * 3)
    params, x = plain.init(KEY, (5,)), jax.random.normal(KEY, (40, 5))
    chex.assert_trees_all_equal(remat.init(KEY, (5,)), params)
    of = lambda net: jax.vjp(lambda p: net.apply(p, x, key=key), params)
    (expected, pull), (found, pull_anew) = of(plain), of(remat)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    chex.assert_trees_all_close(pull_anew(found), pull(expected), rtol=1e-5)
    held = lambda pull: sorted(leaf.shape for leaf in jax.tree.leaves(pull) if leaf.shape[:1] == (40,))
    assert held(pull_anew) == [(40, 5)] * 3
    assert (40, 7) in held(pull)
