"""Every way that a leaf can enter a loss, against vmap(grad) in float64."""

import sys

import jax
import jax.numpy as jnp
import pytest

from jaxnet import losses, nn, per_example

KEY = jax.random.key(0)
CROSS_ENTROPY = losses.softmax_cross_entropy


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def images(model, n=5):
    batch = (normal(1, n, 8, 8, 2), jnp.arange(n) % 3)
    return losses.mean_loss(model.apply, CROSS_ENTROPY), model.init(KEY, (8, 8, 2)), batch


def vectors(network, params, n=6):
    return losses.mean_loss(network, CROSS_ENTROPY), params, (normal(1, n, 4), jnp.arange(n) % 3)


def two_layers(**more):
    return {"first": normal(2, 4, 5), "bias": normal(3, 5), "last": normal(4, 5, 3), **more}


def plain(p, x):
    return jnp.tanh(x @ p["first"] + p["bias"]) @ p["last"]


def lenet():
    return images(nn.serial(nn.conv(3, 3), nn.activation(jnp.tanh), nn.max_pool(2), nn.flatten(), nn.dense(3)))


def xla_convolution():
    """Strided, dilated and padded, channels last."""

    def network(p, x):
        y = jax.lax.conv_general_dilated(
            x,
            p["kernel"],
            (2, 1),
            ((1, 0), (2, 1)),
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.tanh(y).mean(axis=(1, 2)) @ p["last"]

    params = {"kernel": normal(2, 3, 2, 2, 4), "last": normal(3, 4, 3)}
    return losses.mean_loss(network, CROSS_ENTROPY), params, (normal(1, 5, 8, 8, 2), jnp.arange(5) % 3)


def grouped_convolution():
    def network(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", feature_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(y).mean(axis=(1, 2)) @ p["last"]

    params = {"kernel": normal(2, 3, 3, 1, 4), "last": normal(3, 4, 3)}
    return losses.mean_loss(network, CROSS_ENTROPY), params, (normal(1, 5, 8, 8, 2), jnp.arange(5) % 3)


def depthwise_convolution():
    """Each channel by two filters of its own, channels first."""

    def network(p, x):
        y = jax.lax.conv_general_dilated(jnp.moveaxis(x, -1, 1), p["kernel"], (2, 1), "VALID", feature_group_count=2)
        return jnp.tanh(y).mean(axis=(2, 3)) @ p["last"]

    params = {"kernel": normal(2, 4, 1, 3, 2), "last": normal(3, 4, 3)}
    return losses.mean_loss(network, CROSS_ENTROPY), params, (normal(1, 5, 8, 8, 2), jnp.arange(5) % 3)


def tokens(network, params, length=6):
    batch = (jax.random.randint(KEY, (5, length), 0, 7), jnp.arange(5) % 3)
    return losses.mean_loss(network, CROSS_ENTROPY), params, batch


def lookups():
    """Rows of tables, some read twice and some by no example, by index, by `take`, as columns, one by one, and numbers;
    and tokens outside the table, read as 0 or as the last row."""

    def network(p, x):
        h = p["rows"][x].sum(axis=1) + jnp.take(p["taken"], x, axis=0)[:, 0] + p["columns"].T[:, x].sum(axis=2).T
        h += jax.vmap(jax.vmap(lambda i: p["one"][i]))(x).prod(axis=1) + p["numbers"][x].sum(axis=1)[:, None]
        h += p["padded"].at[x - 3].get(mode="fill", fill_value=0, wrap_negative_indices=False).sum(axis=1)
        return jnp.tanh(h + p["clipped"].at[x + 3].get(mode="clip").sum(axis=1)) @ p["last"]

    tables = {name: normal(i, 9, 4) for i, name in enumerate(("rows", "taken", "columns", "one"))}
    outside = {"padded": normal(5, 3, 4), "clipped": normal(6, 5, 4)}
    return tokens(network, {**tables, **outside, "numbers": normal(7, 8), "last": normal(8, 4, 3)})


def looked_up_in_a_scan():
    """One table for all steps, and one for each; complex waves of a third."""

    def network(p, x):
        step = lambda h, t: (jnp.tanh(h + p["rows"][t[0]] + t[1][x[:, 0]]), None)
        h = jax.lax.scan(step, jnp.zeros((len(x), 4)), (x.T, p["layers"]))[0]
        return (h + (p["waves"].astype(complex)[x] * jnp.exp(1j * jnp.arange(4))).sum(axis=1).imag) @ p["last"]

    params = {"rows": normal(2, 7, 4), "layers": normal(3, 6, 7, 4), "waves": normal(4, 7, 4), "last": normal(5, 4, 3)}
    return tokens(network, params)


def tied_embedding():
    """A table that tokens are looked up in, and that their features meet again."""
    network = lambda p, x: jnp.tanh(p["table"][x] @ p["inner"]).mean(axis=1) @ p["table"].T @ normal(5, 7, 3)
    return tokens(network, {"table": normal(2, 7, 4), "inner": normal(3, 4, 4)})


def shared():
    """A table for the first tokens and the last, a kernel for two layers, and one that is reshaped in between."""

    def network(p, x):
        h = jnp.tanh((p["table"][x[:, 0]] * p["table"][x[:, 1]]) @ p["kernel"]) @ p["kernel"]
        return h @ p["folded"] @ p["folded"].reshape(2, 4) @ normal(5, 4, 3)

    return tokens(network, {"table": normal(2, 7, 4), "kernel": normal(3, 4, 4), "folded": normal(4, 4, 2)}, 2)


def nested():
    """A jit within a rematerialisation, called twice with other params."""

    @jax.jit
    def layer(kernel, x):
        return jnp.tanh(x @ kernel)

    network = lambda p, x: layer(p["last"], jax.checkpoint(layer)(p["first"], x) + p["bias"])
    return vectors(network, two_layers())


def kernel_on_the_left():
    return vectors(
        lambda p, x: jax.vmap(lambda v: p["last"].T @ jnp.tanh(p["first"].T @ v + p["bias"]))(x), two_layers()
    )


def heads():
    """Kernels of three axes, contracted by einsum."""
    network = lambda p, x: jnp.einsum("nhk,hkc->nc", jnp.tanh(jnp.einsum("nd,dhk->nhk", x, p["in"])), p["out"])
    return vectors(network, {"in": normal(2, 4, 2, 3), "out": normal(3, 2, 3, 3)})


def tied():
    network = lambda p, x: jnp.tanh(x @ p["first"]) @ p["first"].T @ normal(5, 4, 3)
    return vectors(network, {"first": normal(2, 4, 5)})


def scanned():
    def network(p, x):
        return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, p["layers"])[0] @ p["last"]

    return vectors(network, {"layers": normal(2, 3, 4, 4) / 2, "last": normal(3, 4, 3)})


def scanned_backwards_in_blocks():
    """Two scans within one another, from the last layer to the first, each rematerialised, with kernels p.T."""
    layer = jax.checkpoint(lambda h, p: (jnp.tanh(h @ p["kernel"].T + p["bias"]), h.sum()))

    def network(p, x):
        h, seen = jax.lax.scan(lambda h, block: jax.lax.scan(layer, h, block), x, p["layers"], reverse=True)
        return h @ p["last"] + seen.sum()

    layers = {"kernel": normal(2, 2, 3, 4, 4) / 2, "bias": normal(4, 2, 3, 4)}
    return vectors(network, {"layers": layers, "last": normal(3, 4, 3)})


def recurrent():
    """One kernel for all steps of a sequence, as a scan's constant, and one that its carry changes."""

    def network(p, x):
        step = lambda h, v: ((jnp.tanh(h[0] @ p["hidden"] + v[:, None] * p["in"]), h[1] / 2), h[0] @ h[1])
        (h, _), seen = jax.lax.scan(step, (jnp.ones((len(x), 4)), p["carried"]), x.T)
        return h @ p["last"] + seen.sum(axis=(0, 2))[:, None]

    params = {"hidden": normal(2, 4, 4), "in": normal(4, 4), "carried": normal(5, 4, 2), "last": normal(3, 4, 3)}
    return vectors(network, params)


def meeting_in_a_scan():
    """Layers that are products of two kernels, and one leaf that comes in as layers and whole."""

    def network(p, x):
        step = lambda h, k: (jnp.tanh(h @ (k[0] @ p["shared"]) + h @ p["both"][0] + h @ k[1]), None)
        return jax.lax.scan(step, x, (p["layers"], p["both"]))[0] @ p["last"]

    params = {"layers": normal(2, 3, 4, 4) / 2, "both": normal(4, 3, 4, 4) / 2, "shared": normal(5, 4, 4)}
    return vectors(network, {**params, "last": normal(3, 4, 3)})


def decayed():
    loss, params, batch = vectors(plain, two_layers())
    return lambda p, b: loss(p, b) + 0.1 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p)), params, batch


def custom_derivative():
    @jax.custom_vjp
    def doubled(kernel, x):
        return x @ kernel

    doubled.defvjp(lambda k, x: (x @ k, (k, x)), lambda res, g: (2 * res[1].T @ g, g @ res[0].T))
    return vectors(lambda p, x: jnp.tanh(doubled(p["first"], x)) @ p["last"], two_layers())


def phase_retrieval():
    """Real params that meet complex inputs; and a convolution by a complex kernel."""

    def network(p, x):
        waves = jnp.exp(1j * x) @ p["first"] + p["bias"]
        rows = jax.lax.conv_general_dilated(
            jnp.fft.fft(x)[:, None], p["filter"].T[:, None].astype(complex), (1,), "SAME"
        )
        return (jnp.abs(waves) ** 2 + rows.sum(axis=-1).imag) @ p["last"]

    return vectors(network, two_layers(filter=normal(5, 3, 5)))


def spectrum_of_a_kernel():
    return vectors(lambda p, x: jnp.abs(x @ jnp.fft.fft(p["first"], axis=0)) @ p["last"], two_layers())


def casts():
    """Those that end a derivative, and those that round it."""

    def network(p, x):
        h = x @ p["first"].astype(bool).astype(float) + x @ p["whole"].astype(jnp.int32).astype(float)
        h += x @ p["rounded"].astype(jnp.bfloat16).astype(float) + x @ p["eighth"].astype(jnp.float8_e4m3fn).astype(
            float
        )
        return (h + p["bias"]) @ p["last"]

    return vectors(network, two_layers(whole=normal(5, 4, 5), rounded=normal(6, 4, 5), eighth=normal(7, 4, 5)))


def straight_through():
    """Quantised params, with a derivative as if they were not."""
    ternary = jax.custom_jvp(lambda p: jnp.sign(jnp.round(p)))
    ternary.defjvp(lambda p, t: (ternary(*p), *t))
    by_subtraction = lambda p: p + jax.lax.stop_gradient(jnp.round(p) - p)
    return vectors(lambda p, x: jnp.tanh(x @ ternary(p["first"])) @ by_subtraction(p["last"]), two_layers())


def residual_and_norm():
    block = nn.residual(nn.serial(nn.layer_norm(), nn.dense(4), nn.activation(jax.nn.gelu)))
    model = nn.serial(block, nn.dense(3))
    return vectors(model.apply, model.init(KEY, (4,)))


def group_norm():
    return images(nn.serial(nn.conv(4, 3), nn.group_norm(2), nn.activation(jnp.tanh), nn.flatten(), nn.dense(3)))


def dropout():
    model = nn.serial(nn.dense(6), nn.dropout(0.5), nn.dense(3))

    def loss(params, batch):
        inputs, targets, keys = batch
        one = lambda x, key: model.apply(params, x[None], key=key)[0]
        return CROSS_ENTROPY(jax.vmap(one)(inputs, keys), targets).mean()

    batch = (normal(1, 5, 4), jnp.arange(5) % 3, jax.random.split(KEY, 5))
    return loss, model.init(KEY, (4,)), batch


def transformer():
    model = nn.transformer(7, features=4, num_heads=2, num_layers=1, hidden=6, max_length=5)
    loss = lambda p, b: CROSS_ENTROPY(model.apply(p, b).reshape(-1, 7), jnp.roll(b, -1, axis=1).reshape(-1)).mean()
    return loss, model.init(KEY, (5,)), jax.random.randint(KEY, (4, 5), 0, 7)


CASES = {
    case.__name__: case
    for case in (
        lenet,
        xla_convolution,
        grouped_convolution,
        depthwise_convolution,
        lookups,
        looked_up_in_a_scan,
        tied_embedding,
        shared,
        nested,
        kernel_on_the_left,
        heads,
        tied,
        scanned,
        scanned_backwards_in_blocks,
        recurrent,
        meeting_in_a_scan,
        decayed,
        custom_derivative,
        phase_retrieval,
        spectrum_of_a_kernel,
        casts,
        straight_through,
        residual_and_norm,
        group_norm,
        dropout,
        transformer,
    )
}


@pytest.mark.parametrize("name", CASES)
def test_every_method_is_vmap_of_grad(name, x64, check_per_example):
    check_per_example(*CASES[name]())


def words(case):
    loss, params, batch = CASES[case]()
    return per_example.gradients(loss, params, batch).plan


def test_the_plan_tells_which_way_each_leaf_went(monkeypatch, x64, check_per_example):
    few = "carried: fewer numbers than the factors of "
    assert words("lenet")["0/kernel"] == f"{few}a matrix product"
    assert words("xla_convolution")["kernel"] == f"{few}a convolution"
    for case in ("nested", "kernel_on_the_left"):
        assert words(case)["first"] == words(case)["last"] == "factors of a matrix product, T = 1"
        assert words(case)["bias"] == "carried: small; add"
    assert words("tied")["first"] == "factors of a matrix product and a matrix product, T = 2"
    assert words("decayed")["first"] == "carried: small; used 2 times: a matrix product, integer_pow"
    assert set(words("lookups").values()) == {"factors of a lookup, T = 6", "factors of a matrix product, T = 1"}
    assert words("looked_up_in_a_scan")["layers"] == "factors of a lookup in a scan, S = 6, T = 1"
    assert words("tied_embedding")["table"] == f"{few}a lookup and a matrix product"
    assert words("shared")["table"] == "factors of a lookup and a lookup, T = 2"
    assert words("shared")["folded"].startswith("carried: small; used 2 times")
    for case in ("grouped_convolution", "depthwise_convolution"):
        assert words(case)["kernel"] == f"{few}a convolution"
    assert words("scanned")["layers"] == "factors of a matrix product in a scan, S = 3, T = 1"
    assert words("scanned_backwards_in_blocks")["layers/kernel"].endswith("in a scan in a scan, S = 6, T = 1")
    assert words("phase_retrieval")["first"] == "factors of a matrix product, T = 2"
    for leaf in ("first", "whole", "rounded", "eighth"):
        assert words("casts")[leaf] == "carried: small; convert_element_type"
    assert words("recurrent")["hidden"] == f"{few}a matrix product in a scan"
    monkeypatch.setattr(sys.modules["jaxnet.per_example._held"], "_SMALL", 0)
    jax.clear_caches()
    assert words("recurrent")["carried"] == "vmap(grad): the carry of a scan"
    assert words("custom_derivative")["first"].startswith("vmap(grad): custom_vjp")
    assert words("decayed")["first"].startswith("vmap(grad): used 2 times")
    for case in ("decayed", "recurrent"):
        check_per_example(*CASES[case]())
    jax.clear_caches()


@pytest.mark.parametrize("name", ["lenet", "residual_and_norm"])
def test_factors_found_by_chunks_are_the_same(name, monkeypatch, x64, check_per_example):
    """Five or six examples, two or four at a time."""
    module = sys.modules["jaxnet.per_example._gradients"]
    monkeypatch.setattr(module, "_HELD", 0)
    monkeypatch.setattr(module, "at_once", lambda size: 2 if name == "lenet" else 4)
    loss, params, batch = CASES[name]()
    assert per_example.gradients(loss, params, batch).factors is None
    check_per_example(loss, params, batch)


@pytest.mark.parametrize("name", ["lenet", "scanned", "transformer"])
def test_the_gram_matrix_by_bands_is_the_same(name, monkeypatch, x64, check_per_example):
    """Four to six examples in bands of two."""
    monkeypatch.setattr(sys.modules["jaxnet.per_example._held"], "_BAND", 2)
    check_per_example(*CASES[name]())


def test_gradients_that_are_formed_meet_by_chunks(monkeypatch, x64, check_per_example):
    """Twenty examples, 16 at a time."""
    module = sys.modules["jaxnet.per_example._held"]
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(module, "at_once", lambda size: 1)
    loss, params, _ = decayed()
    check_per_example(loss, params, (normal(1, 20, 4), jnp.arange(20) % 3))
