"""Hessian products of functions that have a rule for reverse differentiation only, or one without a derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import curvature, learning_rate, losses, nn

KEY = jax.random.key(2)


@jax.custom_vjp
def power(x, n):
    """x^n, by a rule that calls the function itself: no forward differentiation."""
    return x**n


power.defvjp(lambda x, n: (power(x, n), (x, n)), lambda kept, g: (g * kept[1] * power(kept[0], kept[1] - 1), None))


@jax.custom_vjp
def reversible(x):
    """tanh, by a rule that calls itself."""
    return jnp.tanh(x)


reversible.defvjp(lambda x: (reversible(x), x), lambda x, g: (g * (1 - reversible(x) ** 2),))


@jax.custom_vjp
def kernel(x):
    """tanh, by a rule that runs outside of JAX, and so has no derivative."""
    return jnp.tanh(x)


def slope_on_the_host(x, g):
    return np.asarray(np.asarray(g) * (1 - np.tanh(x) ** 2), x.dtype)


def kernel_backward(x, g):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return (jax.pure_callback(slope_on_the_host, like, x, g, vmap_method="broadcast_all"),)


kernel.defvjp(lambda x: (kernel(x), x), kernel_backward)


@jax.custom_vjp
def opaque(x):
    return 1 - jnp.tanh(x) ** 2


def no_rule(kept, g):
    raise NotImplementedError("no second derivative")


opaque.defvjp(lambda x: (opaque(x), x), no_rule)


@jax.custom_vjp
def nested(x):
    """tanh, by a rule that calls a function whose own rule raises."""
    return jnp.tanh(x)


nested.defvjp(lambda x: (nested(x), x), lambda x, g: (g * opaque(x),))


def network(activation):
    model = nn.mlp([6, 4], activation=activation)
    return losses.mean_loss(model.apply, losses.softmax_cross_entropy)


def problem():
    loss = network(jnp.tanh)
    keys = jax.random.split(jax.random.key(1), 2)
    batch = (jax.random.normal(keys[0], (12, 5)), jax.random.randint(keys[1], (12,), 0, 4))
    params = nn.mlp([6, 4], activation=jnp.tanh).init(jax.random.key(0), (5,))
    flat, unravel = ravel_pytree(params)
    dense = np.asarray(jax.hessian(lambda w: loss(unravel(w), batch))(flat), np.float64)
    return params, batch, dense


def in_batches(batch):
    return [tuple(x[i : i + 5] for x in batch) for i in (0, 5, 10)]


def test_a_function_with_a_reverse_rule_only(x64):
    x = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0]])
    own = lambda params, batch: jnp.mean(power(batch @ params, 4.0))
    plain = lambda params, batch: jnp.mean((batch @ params) ** 4)
    params = jnp.array([0.4, -0.7])
    dense = jax.hessian(plain)(params, x)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(jax.grad(own), (params, x), (params, x))
    found = curvature.sharpness(own, params, x, key=KEY, tol=1e-8)
    np.testing.assert_allclose(found.value, np.linalg.eigvalsh(dense)[-1], rtol=1e-7)
    assert (found.product, found.product_error) == ("reverse over reverse", 0)
    for loss in (own, losses.chunked(own, 2)):
        product = curvature.hessian(loss, params, x) @ jnp.ones(2)
        np.testing.assert_allclose(product, dense @ jnp.ones(2), rtol=1e-10)
    spread = lambda loss: curvature.sharpness(loss, params, x, key=KEY, tol=1e-8, sampling_error=True).sampling_error
    np.testing.assert_allclose(spread(own), spread(plain), rtol=1e-6)


@pytest.mark.parametrize("activation", [kernel, nested])
def test_a_rule_without_a_derivative_is_taken_by_differences(activation):
    params, batch, dense = problem()
    top, loss = np.linalg.eigvalsh(dense)[-1], network(activation)
    found = curvature.sharpness(loss, params, batch, key=KEY)
    assert found.product == "differences of gradients"
    assert found.converged
    assert 0 < found.product_error < 1e-3 * top
    assert abs(found.value - top) <= found.product_error + 1e-3 * top
    assert top <= found.upper_bound < 1.01 * top
    # Without the error the bound would be the plain loss's.
    plain = curvature.sharpness(network(jnp.tanh), params, batch, key=KEY)
    assert found.upper_bound >= plain.upper_bound
    with pytest.raises(TypeError, match=r"product=curvature\.Differences"):
        curvature.hessian(loss, params, batch) @ params


def test_what_needs_a_derivative_says_what_to_do_instead():
    params, batch, _ = problem()
    loss = network(nested)
    for call in (curvature.layer_sharpness, functools.partial(learning_rate.analyse, batch_sizes=[4])):
        with pytest.raises(TypeError, match="plain implementation"):
            call(loss, params, batch, key=KEY)
    named = curvature.layer_sharpness(loss, params, batch, key=KEY, product=curvature.Differences())
    plain = curvature.layer_sharpness(network(jnp.tanh), params, batch, key=KEY)
    for name, pairs in plain.items():
        np.testing.assert_allclose(named[name].values, pairs.values, rtol=5e-3)


def test_an_error_above_the_tolerance_is_not_converged():
    params, batch, dense = problem()
    found = curvature.sharpness(network(kernel), params, batch, key=KEY, tol=1e-5)
    assert found.product_error > 1e-5 * found.value
    assert not found.converged
    # Nor is one whose step is far too long; and its bound holds all the same.
    wide = curvature.sharpness(network(jnp.tanh), params, batch, key=KEY, product=curvature.Differences(60))
    assert wide.product_error > 1e-3 * wide.value
    assert not wide.converged
    assert wide.upper_bound >= np.linalg.eigvalsh(dense)[-1]


def test_differences_of_a_stream_a_chunked_loss_and_under_jit():
    params, batch, dense = problem()
    loss = network(kernel)
    top = np.linalg.eigvalsh(dense)[-1]
    by = functools.partial(curvature.sharpness, key=KEY)
    for found in (
        by(loss, params, in_batches(batch)),
        by(losses.chunked(loss, 5), params, batch),
        jax.jit(lambda p, b: by(loss, p, b))(params, batch),
        by(loss, params, batch, v0=params),
    ):
        assert found.product == "differences of gradients"
        np.testing.assert_allclose(found.value, top, rtol=2e-3)


def test_every_way_is_the_dense_hessian(x64):
    params, batch, dense = problem()
    v = jax.tree.map(jnp.sin, params)
    expected = dense @ ravel_pytree(v)[0]
    ways = (
        (curvature.forward_over_reverse, 1e-12),
        (curvature.reverse_over_reverse, 1e-12),
        (curvature.Differences(), 1e-8),
    )
    for way, tol in ways:
        op = curvature.hessian(network(jnp.tanh), params, batch, product=way)
        np.testing.assert_allclose(ravel_pytree(op @ v)[0], expected, rtol=0, atol=tol)
        assert not ravel_pytree(op @ jax.tree.map(jnp.zeros_like, v))[0].any()
        pairs = curvature.eigsh(op, 2, key=KEY, tol=1e-6)
        np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(dense)[:-3:-1], rtol=1e-6)
    own = lambda gradient, p, v: jax.tree.map(lambda x: 2 * x, curvature.forward_over_reverse(gradient, p, v))
    found = curvature.sharpness(network(jnp.tanh), params, batch, key=KEY, product=own)
    np.testing.assert_allclose(found.value, 2 * np.linalg.eigvalsh(dense)[-1], rtol=1e-3)


def test_the_error_of_differences_is_bounded_by_its_estimate():
    """Against the dense matrix in random directions, over steps that are too short, right and too long."""
    params, batch, dense = problem()
    loss = network(kernel)
    for step in (0.01, 0.1, 1.0, 10.0, 60.0):
        way = curvature.Differences(step)
        one, two = (curvature.hessian(loss, params, batch, product=w) for w in (way, way.doubled))
        for seed in range(5):
            v = one.space.random(jax.random.key(seed))
            missed = np.linalg.norm(ravel_pytree(one @ v)[0] - dense @ np.asarray(ravel_pytree(v)[0], np.float64))
            estimate = np.linalg.norm(ravel_pytree((one - two) @ v)[0])
            assert missed < 1.5 * estimate, step


@pytest.mark.slow
@pytest.mark.parametrize("keeps_its_parts", [True, False])
def test_analyse_of_a_network_with_a_reverse_rule_only_is_the_plain_ones(x64, keeps_its_parts):
    params, batch, _ = problem()
    found = []
    for activation in (reversible, jnp.tanh):
        loss = network(activation)
        given = loss if keeps_its_parts else (lambda p, b, loss=loss: loss(p, b))
        found.append(learning_rate.analyse(given, params, batch, key=KEY, batch_sizes=[4]))
    np.testing.assert_allclose(found[0].rate(4), found[1].rate(4), rtol=1e-6)
    np.testing.assert_allclose(found[0].bracket(4), found[1].bracket(4), rtol=1e-6)


def test_a_pushforward_of_both_kinds(x64):
    x, v = jnp.array([0.3, -1.0]), jnp.array([1.0, 2.0])
    function = lambda f: lambda x: (jnp.sum(f(x) ** 2), f(2 * x))
    for mine, plain in zip(
        jax.tree.leaves(curvature.pushforward(function(reversible), x, v)),
        jax.tree.leaves(jax.jvp(function(jnp.tanh), (x,), (v,))),
        strict=True,
    ):
        np.testing.assert_allclose(mine, plain, rtol=1e-12)


def test_scale_by_sharpness_of_a_reverse_rule_only(x64):
    params, batch, dense = problem()
    transform = learning_rate.scale_by_sharpness(key=KEY, fraction=1.0)
    loss = network(reversible)
    value_fn = lambda p: loss(p, batch)
    _, state = transform.update(jax.grad(value_fn)(params), transform.init(params), params, value_fn=value_fn)
    np.testing.assert_allclose(state.sharpness, np.linalg.eigvalsh(dense)[-1], rtol=0.05)


def test_what_a_loss_raises_by_itself_is_not_taken_for_a_missing_derivative():
    with pytest.raises(ZeroDivisionError):
        curvature.sharpness(lambda p, b: p.sum() * b.mean() * (1 / 0), jnp.ones(3), jnp.ones(2), key=KEY)
    with pytest.raises(ValueError, match="step: expected a positive and finite number"):
        curvature.Differences(0.0)


@pytest.mark.parametrize(
    ("loss", "point"),
    [(lambda p, b: (p[0] ** 2 + jnp.nan) * b[0], [1.0, 1.0]), (lambda p, b: p[0] ** 2, [1.0, np.nan])],
)
def test_a_form_is_nan_where_a_product_is(loss, point):
    op = curvature.hessian(loss, jnp.array(point), jnp.ones(3))
    assert np.isnan(op @ jnp.ones(2)).any()
    assert np.isnan(curvature.quadratic_form(op, jnp.ones(2)))


@pytest.mark.parametrize("size", [None, 2])
def test_the_forms_of_single_examples_are_those_of_their_dense_hessians(x64, size):
    loss = lambda p, b: jnp.mean(jnp.sin(b[0] @ p) * b[1] + (p**3).sum())
    params, batch = jnp.array([0.3, -0.7]), (jax.random.normal(KEY, (5, 2)), jnp.arange(5.0))
    v = jnp.array([0.4, 1.1])
    one = lambda n: v @ jax.hessian(loss)(params, jax.tree.map(lambda x: x[n : n + 1], batch)) @ v
    op = curvature.hessian(loss, params, batch)
    found = curvature.quadratic_forms(op, v, size=size)
    np.testing.assert_allclose(found, [one(n) for n in range(5)], rtol=1e-10)
    np.testing.assert_allclose(found.mean(), curvature.quadratic_form(op, v), rtol=1e-10)
    with pytest.raises(TypeError, match="expected an operator of jaxnet.curvature.hessian"):
        curvature.quadratic_forms(curvature.shift(op, 1.0), v)
