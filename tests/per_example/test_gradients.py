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
