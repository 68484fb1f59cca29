import functools
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import losses, nn, per_example

KEY = jax.random.key(0)


def network(name, n=10):
    """A loss, params and N examples."""
    init, inputs, labels = jax.random.split(KEY, 3)
    if name == "transformer":
        model, shape = nn.transformer(11, features=8, num_heads=2, num_layers=2, hidden=16, max_length=6), (6,)
        batch = jax.random.randint(inputs, (n, 6), 0, 11), jax.random.randint(labels, (n, 6), 0, 11)
    else:
        model, shape = (nn.mlp([6, 4]), (5,)) if name == "mlp" else (nn.lenet(4), (16, 16, 1))
        batch = jax.random.normal(inputs, (n, *shape)), jax.random.randint(labels, (n,), 0, 4)
    return losses.mean_loss(model.apply, losses.softmax_cross_entropy), model.init(init, shape), batch


def by_hand(loss, params, batch):
    """vmap of grad."""
    one = lambda example: jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example))
    return jax.vmap(one)(batch)


def same(a, b, tolerance=1e-6):
    scale = float(optax.tree.norm(b, ord=jnp.inf))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * scale), a, b)


@pytest.mark.parametrize("name", ["lenet", pytest.param("transformer", marks=pytest.mark.slow)])
def test_it_is_what_optax_aggregates(name):
    loss, params, batch = network(name)
    grads = by_hand(loss, params, batch)
    norms = jax.vmap(optax.tree.norm)(grads)
    bound = float(jnp.median(norms))
    aggregate = optax.contrib.differentially_private_aggregate(bound, 0.0, key=KEY)
    expected, _ = aggregate.update(grads, aggregate.init(params))
    grad = per_example.clipped_grad(loss, bound, microbatch_size=4, has_aux=True)
    found, aux = jax.jit(grad)(params, batch)
    same(found, expected)
    np.testing.assert_allclose(aux.norms, norms, rtol=1e-5)
    assert float(aux.share) == 0.5
    np.testing.assert_allclose(aux.values.mean(), loss(params, batch), rtol=1e-6)


def test_it_is_what_jax_privacy_clips():
    with warnings.catch_warnings(action="ignore"):
        clipped_grad = pytest.importorskip("jax_privacy").clipped_grad
    loss, params, batch = network("mlp")
    padding = jnp.arange(10) > 6
    theirs = clipped_grad(
        loss, l2_clip_norm=0.5, normalize_by=8.0, return_values=True, return_grad_norms=True, microbatch_size=5
    )
    with warnings.catch_warnings(action="ignore"):
        expected, aux = theirs(params, batch, is_padding_example=padding)
    ours = per_example.clipped_grad(loss, 0.5, normalise_by=8.0, has_aux=True, microbatch_size=5)
    found, mine = ours(params, batch, is_padding_example=padding)
    same(found, expected)
    np.testing.assert_allclose(mine.values, aux.values, rtol=1e-5)
    np.testing.assert_allclose(mine.norms, aux.grad_norms, rtol=1e-5)


def test_without_a_bound_it_is_the_gradient_and_a_stream_serves():
    loss, params, batch = network("mlp")
    found = per_example.clipped_grad(loss, jnp.inf)(params, batch)
    same(found, jax.grad(loss)(params, batch))
    parts = [jax.tree.map(lambda x: x[:7], batch), jax.tree.map(lambda x: x[7:], batch)]
    grad = per_example.clipped_grad(loss, 0.4, has_aux=True)
    padding = jnp.arange(10) % 3 == 0
    whole, streamed = (grad(params, b, is_padding_example=padding) for b in (batch, parts))
    same(streamed, whole)


@pytest.mark.parametrize("small", [4096, 0])
def test_no_example_moves_the_sum_by_more_than_the_norm(small, monkeypatch):
    """Padding, an outlier, and one that is not finite; biases carried, and by vmap(grad)."""
    monkeypatch.setattr(sys.modules["jaxnet.per_example._held"], "_SMALL", small)
    jax.clear_caches()
    loss, params, batch = network("mlp")
    grad = per_example.clipped_grad(loss, 0.1, normalise_by=1, has_aux=True)
    eight = jax.tree.map(lambda x: x[:8], batch)
    expected, _ = grad(params, eight)
    for bad in (jnp.nan, jnp.inf, 1e30):
        inputs = batch[0].at[8:].set(bad)
        found, aux = grad(params, (inputs, batch[1]))
        if bad == 1e30:  # finite or not, by the activation
            assert float(optax.tree.norm(optax.tree.sub(found, expected))) <= 0.2 * (1 + 1e-5)
        else:
            same(found, expected)
            assert not np.isfinite(aux.norms[8:]).any()
        padded, aux = grad(params, (inputs, batch[1]), is_padding_example=jnp.arange(10) >= 8)
        same(padded, expected)
        assert float(aux.share) == 1
    one, _ = grad(params, batch, is_padding_example=jnp.arange(10) != 3)
    np.testing.assert_allclose(optax.tree.norm(one), 0.1, rtol=1e-5)
    jax.clear_caches()


def test_the_noise_has_the_stated_deviation():
    """σ C/M = 2 · 0.5/4 in each entry, of several kinds of leaves; another key gives other noise."""
    loss, params, batch = network("mlp")
    clean = per_example.clipped_grad(loss, 0.5, normalise_by=4)(params, batch)
    noisy = per_example.clipped_grad(loss, 0.5, normalise_by=4, noise_multiplier=2.0)
    apart = lambda key: optax.tree.sub(noisy(params, batch, key=key), clean)
    noise = jax.jit(jax.vmap(apart))(jax.random.split(KEY, 2000))
    for leaf in jax.tree.leaves(noise):
        np.testing.assert_allclose(leaf.std(), 0.25, rtol=0.05)
        assert abs(float(leaf.mean())) < 0.01
    rows = np.concatenate([x.reshape(2000, -1) for x in jax.tree.leaves(noise)], axis=1)
    apart = np.corrcoef(rows.T) - np.eye(rows.shape[1])
    assert np.abs(apart).max() < 0.12


def test_a_bound_and_a_multiplier_may_be_traced_and_half_precision_is_summed_in_more():
    loss, params, batch = network("mlp", 4096)

    @jax.jit
    def step(params, batch, bound, multiplier):
        grad = per_example.clipped_grad(loss, bound, noise_multiplier=multiplier)
        return grad(params, batch, key=KEY)

    same(step(params, batch, 0.3, 0.0), per_example.clipped_grad(loss, 0.3)(params, batch))
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    found = step(halved, batch, 0.3, 0.0)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    same(jax.tree.map(lambda x: x.astype(jnp.float32), found), step(params, batch, 0.3, 0.0), 0.1)


def test_memory_stays_below_a_plain_gradients():
    """Temporaries and results, of a batch in memory."""
    for name, n in (("mlp", 512), ("lenet", 64), ("transformer", 256)):
        loss, params, batch = network(name, n)
        needed = []
        for grad in (per_example.clipped_grad(loss, 0.1), jax.grad(loss)):
            found = jax.jit(lambda p, b, grad=grad: grad(p, b)).lower(params, batch).compile().memory_analysis()
            needed.append(found.temp_size_in_bytes + found.output_size_in_bytes)
        assert needed[0] < 1.2 * needed[1], name


def test_what_is_out_of_range_is_refused():
    loss, params, batch = network("mlp")
    clip = functools.partial(per_example.clipped_grad, loss)
    grads = per_example.gradients(loss, params, batch)
    for wrong in (-1.0, jnp.array(-1.0), np.nan):
        with pytest.raises(ValueError, match="max_norm: expected a number of 0 or more"):
            grads.clipped_mean(wrong)
        with pytest.raises(ValueError, match="max_norm: expected a number of 0 or more"):
            clip(wrong)
    with pytest.raises(ValueError, match="noise_multiplier"):
        clip(1.0, noise_multiplier=-1.0)
    with pytest.raises(ValueError, match="max_norm: expected a finite"):
        clip(np.inf, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="normalise_by"):
        clip(1.0, normalise_by=0)
    with pytest.raises(ValueError, match="microbatch_size"):
        clip(1.0, microbatch_size=0)
    with pytest.raises(TypeError, match="key: expected a jax.random.key"):
        clip(1.0, noise_multiplier=1.0)(params, batch)
    with pytest.raises(TypeError, match="is_padding_example: expected booleans"):
        clip(1.0)(params, batch, is_padding_example=jnp.zeros(10))
    with pytest.raises(ValueError, match=r"is_padding_example: expected shape \(10,\)"):
        clip(1.0)(params, batch, is_padding_example=jnp.zeros(9, bool))
