import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import data, losses, nn, per_example


@pytest.fixture
def problem(x64):
    """The last kernel is used twice, and so has no factors."""
    key = jax.random.key(0)
    model = nn.mlp([5, 3])
    inner = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    loss = lambda params, batch: inner(params, batch) + 0.1 * jnp.sum(params[2]["kernel"] ** 2)
    batch = (jax.random.normal(key, (150, 4)), jax.random.randint(key, (150,), 0, 3))
    return loss, model.init(key, (4,)), batch


@pytest.fixture
def rows(problem):
    """The definition, as a plain loop: one row an example."""
    loss, params, batch = problem
    gradient = jax.jit(jax.grad(loss))
    return np.stack(
        [ravel_pytree(gradient(params, jax.tree.map(lambda x: x[n : n + 1], batch)))[0] for n in range(len(batch[1]))]
    )


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def test_every_method_against_the_definition(problem, rows):
    loss, params, batch = problem
    grads = per_example.gradients(loss, params, batch)
    close = lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-13)
    n = len(rows)
    close(flat(grads.mean()), rows.mean(axis=0))
    close(grads.norms(), np.linalg.norm(rows, axis=1))
    close(flat(grads.second_moment()), (rows**2).mean(axis=0))
    close(flat(grads.variance()), rows.var(axis=0, ddof=1))
    close(grads.gram(), rows @ rows.T)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=n))
    close(flat(grads.weighted_sum(weights)), weights @ rows)
    v = optax.tree.random_like(jax.random.key(1), params, jax.random.normal)
    close(grads.vdot(v), rows @ flat(v))
    close(grads.cosine(v), rows @ flat(v) / np.linalg.norm(rows, axis=1) / np.linalg.norm(flat(v)))
    close(grads.distances(v), np.linalg.norm(rows - flat(v), axis=1))
    bound = float(np.median(np.linalg.norm(rows, axis=1)))
    factors = np.minimum(1, bound / np.linalg.norm(rows, axis=1))
    close(flat(grads.clipped_mean(bound)), (factors[:, None] * rows).mean(axis=0))
    dense = grads.dense()
    close(np.concatenate([x.reshape(n, -1) for x in jax.tree.leaves(dense)], axis=1), rows)


def test_methods_cross_jit(problem):
    loss, params, batch = problem
    grads = per_example.gradients(loss, params, batch)
    chex.assert_trees_all_close(
        jax.jit(lambda g: (g.mean(), g.norms()))(grads), (grads.mean(), grads.norms()), rtol=1e-9
    )


@pytest.mark.parametrize("held", [2**22, 0])
def test_what_is_made_of_the_gradients_has_derivatives(problem, rows, held, monkeypatch):
    """By the weights and by the params, against the same functions of all N gradients as a matrix."""
    module = sys.modules["jaxnet.per_example._gradients"]
    monkeypatch.setattr(module, "_HELD", held)
    loss, params, batch = problem
    batch = jax.tree.map(lambda x: x[:6], batch)
    weights = jnp.linspace(-1, 2, 6)
    bound = float(np.median(np.linalg.norm(rows[:6], axis=1)))
    one = lambda params, example: ravel_pytree(jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example)))[0]

    def ours(params, weights):
        grads = per_example.gradients(loss, params, batch)
        summed, clipped = grads.weighted_sum(weights), grads.clipped_mean(bound)
        return flat_sum(summed) + flat_sum(clipped) * 3 + jnp.sum(weights * grads.norms()) + jnp.sum(grads.gram() ** 2)

    def expected(params, weights):
        rows = jax.vmap(one, in_axes=(None, 0))(params, batch)
        norms = jnp.linalg.norm(rows, axis=1)
        clipped = (rows * jnp.minimum(1, bound / norms)[:, None]).mean(axis=0)
        along = jnp.sum((weights @ rows) ** 2) + 3 * jnp.sum(clipped**2)
        return along + jnp.sum(weights * norms) + jnp.sum((rows @ rows.T) ** 2)

    def both(function):
        gradient = jax.grad(function, argnums=(0, 1))
        return jax.jit(lambda: jax.jvp(gradient, (params, weights), (params, weights)))()

    chex.assert_trees_all_close(both(ours), both(expected), rtol=1e-9, atol=1e-9)


def flat_sum(tree):
    return optax.tree.norm(tree, squared=True)


def test_an_example_without_gradient_has_a_derivative(x64):
    """g_n = p x_n, one x_n = 0: the derivative of Σ‖g_n‖ by p is Σ|x_n|, and of the clipped mean the mean of x_n."""
    loss = lambda p, x: jnp.mean(p**2 * x) / 2
    x = jnp.array([0.0, 0.5, 1.0])
    grads = lambda p: per_example.gradients(loss, p, x)
    assert jax.grad(lambda p: grads(p).norms().sum())(jnp.array(1.0)) == 1.5
    assert jax.grad(lambda p: grads(p).clipped_mean(2.0))(jnp.array(1.0)) == 0.5


def test_bad_arguments(mlp_problem):
    loss, params, batch = mlp_problem
    grads = per_example.gradients(loss, params, batch)
    with pytest.raises(ValueError, match=r"shape \(12,\)"):
        grads.weighted_sum(jnp.ones(5))
    with pytest.raises(ValueError, match="two examples"):
        per_example.gradients(loss, params, jax.tree.map(lambda x: x[:1], batch)).variance()


def test_dropout_keys_of_a_batch_are_each_examples_own(x64):
    model = nn.serial(nn.dense(6), nn.dropout(0.5), nn.dense(3))
    params = model.init(jax.random.key(0), (4,))
    batch = data.with_keys(jax.random.key(1), (jnp.ones((5, 4)), jnp.zeros(5, jnp.int32)))
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    grads = per_example.gradients(loss, params, batch)
    assert len(np.unique(np.asarray(grads.norms()).round(9))) == 5
    np.testing.assert_allclose(flat(grads.mean()), flat(jax.grad(loss)(params, batch)), rtol=1e-9)


def test_a_tree_is_paired_by_structure_never_by_position(problem):
    loss, params, batch = problem
    grads = per_example.gradients(loss, params, batch)
    other_keys = jax.tree.map(lambda layer: layer, [{"b": p["bias"], "k": p["kernel"]} if p else () for p in params])
    for method in (grads.vdot, grads.cosine, grads.distances, grads.sum_of_deviations):
        for wrong in (other_keys, tuple(other_keys), jax.tree.map(lambda x: x[None], params)):
            with pytest.raises(ValueError, match="tree: expected a pytree like params"):
                method(wrong)
