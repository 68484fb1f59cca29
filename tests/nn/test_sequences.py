import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import losses, nn

KEY = jax.random.key(0)
SIZES = {"features": 6, "num_heads": 2, "num_layers": 2, "hidden": 5, "max_length": 4}


@pytest.fixture
def decoder(x64):
    """A transformer, params drawn anew (so that none is 0 or 1) and tokens (3, 4) of 7 kinds, in float64."""
    model, draw = nn.transformer(7, **SIZES), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(KEY, (4,)))
    params = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), shapes)
    return jax.jit(model.apply), params, jnp.asarray(draw.integers(0, 7, (3, 4)))


def attention(params, x, num_heads, causal):
    """One head and one position at a time."""
    y = np.zeros(x.shape)
    for n, t in np.ndindex(x.shape[:2]):
        seen = x[n, : t + 1] if causal else x[n]
        heads = []
        for columns in np.split(np.arange(x.shape[-1]), num_heads):
            query, keys, values = (
                x[n, t] @ params["query"][:, columns],
                *(seen @ params[name][:, columns] for name in ("key", "value")),
            )
            weights = np.exp(keys @ query / np.sqrt(len(columns)))
            heads.append(weights @ values / weights.sum())
        y[n, t] = np.concatenate(heads) @ params["out"]
    return y


def norm(params, x):
    unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return params["scale"] * unit + params["bias"]


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_attention_is_the_formula_head_by_head(x64, num_heads, causal):
    layer = nn.self_attention(num_heads, causal=causal)
    params, x = layer.init(KEY, (5, 6)), jax.random.normal(KEY, (2, 5, 6))
    expected = attention(jax.tree.map(np.asarray, params), np.asarray(x), num_heads, causal)
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-12, atol=1e-12)


def test_attention_of_large_scores_is_finite():
    layer = nn.self_attention(2)
    params, x = layer.init(KEY, (5, 6)), 1e3 * jax.random.normal(KEY, (2, 5, 6))
    value_and_grad = jax.jit(jax.value_and_grad(lambda p, x: layer.apply(p, x).sum(), (0, 1)))
    chex.assert_tree_all_finite(value_and_grad(params, x))


def uses(jaxpr, var):
    for eqn in jaxpr.eqns:
        for i, used in enumerate(eqn.invars):
            if used is var and "jaxpr" in eqn.params:
                inner = eqn.params["jaxpr"].jaxpr
                yield from uses(inner, inner.invars[i])
            elif used is var:
                yield eqn


def test_each_kernel_meets_one_matrix_product_without_batch_axes(decoder):
    apply, params, tokens = decoder
    jaxpr = jax.make_jaxpr(apply)(params, tokens).jaxpr
    leaves = zip(jax.tree.leaves_with_path(params), jaxpr.invars, strict=False)
    kernels = [var for (path, _), var in leaves if path[-1].key in ("kernel", "query", "key", "value", "out")]
    assert len(kernels) == 2 * (4 + 2) + 1
    for kernel in kernels:
        (eqn,) = uses(jaxpr, kernel)
        assert eqn.primitive.name == "dot_general"
        assert eqn.params["dimension_numbers"][1] == ((), ())


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_embed_gives_rows_and_nan_where_there_is_none(x64, dtype):
    layer = nn.embed(5, 3)
    params = layer.init(KEY, (2,))
    tokens = np.array([[0, 4], [2, 2]])
    np.testing.assert_array_equal(layer.apply(params, jnp.asarray(tokens, dtype)), params["embedding"][tokens])
    wrong = {"int32": [5, -1, -5], "uint8": [5, 255, 251], "int64": [2**32, 2**32 + 1, -1]}[dtype]
    y = layer.apply(params, jnp.asarray([[1, *wrong]], dtype))
    np.testing.assert_array_equal(np.isnan(y[0]), [[False] * 3] + 3 * [[True] * 3])


def test_embed_takes_its_place_in_serial_and_refuses_floats():
    model = nn.serial(nn.embed(5, 3), nn.flatten(), nn.dense(2))
    params = model.init(KEY, (4,))
    chex.assert_shape(params[2]["kernel"], (12, 2))
    chex.assert_shape(model.apply(params, jnp.zeros((2, 4), int)), (2, 2))
    for tokens in (jnp.ones((2, 4)), jnp.ones((2, 4), bool)):
        with pytest.raises(TypeError, match=f"embed: expected integer tokens, got {tokens.dtype}"):
            model.apply(params, tokens)


def test_transformer_is_its_formula(decoder):
    apply, params, tokens = decoder
    table, positions, *blocks, last, readout = jax.tree.map(np.asarray, params)
    h = table["embedding"][tokens] + positions["embedding"]
    for (norm1, attend), (norm2, first, _, second) in blocks:
        h = h + attention(attend, norm(norm1, h), 2, causal=True)
        h = h + dense(second, gelu(dense(first, norm(norm2, h))))
    np.testing.assert_allclose(apply(params, tokens), dense(readout, norm(last, h)), rtol=1e-10, atol=1e-10)


def test_transformer_has_its_number_of_parameters(decoder):
    apply, params, tokens = decoder
    chex.assert_shape(apply(params, tokens[:, :3]), (3, 3, 7))
    block = 4 * 6 * 6 + (6 * 5 + 5) + (5 * 6 + 6) + 2 * 12
    assert sum(x.size for x in jax.tree.leaves(params)) == 7 * 6 + 4 * 6 + 2 * block + 12 + (6 * 7 + 7)
    assert nn.transformer(7, **SIZES) is nn.transformer(vocabulary=7, **SIZES)


def test_transformer_sees_neither_later_tokens_nor_other_examples(decoder):
    apply, params, tokens = decoder
    logits, changed = (apply(params, x) for x in (tokens, tokens.at[1, 2].set((tokens[1, 2] + 1) % 7)))
    moved = np.abs(logits - changed).max(axis=-1) > 1e-6
    np.testing.assert_array_equal(moved, [[False] * 4, [False, False, True, True], [False] * 4])
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(apply(params, tokens[order]), logits[order], rtol=1e-12)
    wrong = np.isnan(apply(params, tokens.at[1, 2].set(7))).any(axis=(1, 2))
    np.testing.assert_array_equal(wrong, [False, True, False])


def test_transformer_has_a_loss_and_a_gradient(decoder):
    apply, params, tokens = decoder
    batch = (tokens[:, :-1], tokens[:, 1:])
    loss = losses.mean_loss(apply, losses.softmax_cross_entropy)
    value, grad = jax.jit(jax.value_and_grad(loss))(params, batch)
    log_p = np.asarray(jax.nn.log_softmax(apply(params, batch[0])))
    picked = [log_p[n, t, batch[1][n, t]] for n, t in np.ndindex(3, 3)]
    np.testing.assert_allclose(value, -np.mean(picked), rtol=1e-12)
    chex.assert_tree_all_finite(grad)
    assert all(np.any(g != 0) for g in jax.tree.leaves(grad))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.embed(0, 3), "vocabulary and features >= 1, got 0 and 3"),
        (lambda: nn.self_attention(0), "num_heads >= 1, got 0"),
        (lambda: nn.self_attention(4).init(KEY, (5, 6)), "self_attention: .* num_heads to divide d, got 4 and 6"),
        (lambda: nn.self_attention(2).init(KEY, (6,)), "inputs (N, T, d), got (N, *(6,))"),
        (lambda: nn.self_attention(2).apply(nn.self_attention(2).init(KEY, (5, 6)), jnp.ones((1, 5, 4))), "(N, T, 6)"),
        (lambda: nn.self_attention(4).apply(nn.self_attention(2).init(KEY, (5, 6)), jnp.ones((1, 5, 6))), "4 and 6"),
        *((lambda n=n: nn.transformer(7, **SIZES | {n: 0}), f"transformer: expected {n} >= 1, got 0") for n in SIZES),
        (lambda: nn.transformer(7, **SIZES | {"num_heads": 4}), "num_heads to divide features, got 4 and 6"),
        (lambda: nn.transformer(7, **SIZES).init(KEY, (5,)), "T <= max_length = 4, got (1, 5)"),
        (lambda: nn.transformer(7, **SIZES).init(KEY, (2, 4)), "tokens (N, T) with T <= max_length = 4, got (1, 2, 4)"),
    ],
)
def test_bad_arguments_say_what_was_expected(make, words):
    with pytest.raises(ValueError, match=words if ".*" in words else re.escape(words)):
        make()
