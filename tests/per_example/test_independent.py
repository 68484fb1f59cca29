import chex
import jax
import jax.numpy as jnp
import pytest

from jaxnet import curvature, learning_rate, losses, nn, per_example

KEY = jax.random.key(0)


def problem(apply=None):
    model = nn.mlp([6, 3])
    batch = (jax.random.normal(KEY, (10, 4)), jnp.arange(10) % 3)
    loss = losses.mean_loss(apply or model.apply, losses.softmax_cross_entropy)
    return loss, model.init(KEY, (4,)), batch


def batch_normalised(params, x):
    """Batch normalisation in training mode, by hand."""
    x = (x - x.mean(axis=0)) / jnp.sqrt(x.var(axis=0) + 1e-3)
    return nn.mlp([6, 3]).apply(params, x)


def test_a_mean_over_independent_examples_passes():
    loss, params, batch = problem()
    per_example.check_independent(loss, params, batch)
    per_example.check_independent(losses.chunked(loss, 3), params, batch)
    per_example.check_independent(loss, params, jax.tree.map(lambda x: x[:1], batch))


def test_coupled_examples_a_sum_and_a_vector_are_refused():
    loss, params, batch = problem()
    coupled, _, _ = problem(batch_normalised)
    with pytest.raises(ValueError, match="mean of their own losses is .* batch normalisation"):
        per_example.check_independent(coupled, params, batch)
    with pytest.raises(ValueError, match="or is it a sum"):
        per_example.check_independent(lambda p, b: len(b[1]) * loss(p, b), params, batch)
    # Equal in value, but not in its gradient.
    sneaky = lambda p, b: loss(p, b) + len(b[1]) * (p[0]["bias"].sum() - jax.lax.stop_gradient(p[0]["bias"].sum()))
    with pytest.raises(ValueError, match="its gradient on 10 examples"):
        per_example.check_independent(sneaky, params, batch)
    with pytest.raises(ValueError, match="expected a real scalar"):
        per_example.check_independent(lambda p, b: b[0] @ p[0]["kernel"], params, batch)


def test_a_weight_for_each_class_is_seen_where_examples_lie_sorted():
    x, labels = jax.random.normal(KEY, (200, 4)), jnp.repeat(jnp.arange(2), 100)
    model = nn.dense(2)
    weights = jnp.array([1.0, 5.0])

    def weighted(params, batch):
        values = losses.softmax_cross_entropy(model.apply(params, batch[0]), batch[1])
        w = weights[batch[1]]
        return (w * values).sum() / w.sum()

    params = model.init(KEY, (4,))
    per_example.check_independent(weighted, params, (x[:100], labels[:100]))  # of one class it is a mean
    for seed in range(10):
        with pytest.raises(ValueError, match="on 32 examples it is"):
            per_example.check_independent(weighted, params, (x, labels), key=jax.random.key(seed))


@pytest.mark.parametrize(
    "call",
    [
        lambda loss, params, batch: per_example.noise_scale(loss, params, batch),
        lambda loss, params, batch: curvature.empirical_fisher(loss, params, batch),
        lambda loss, params, batch: curvature.gradient_covariance(loss, params, batch),
        lambda loss, params, batch: losses.chunked(loss, 4)(params, batch),
        lambda loss, params, batch: curvature.sharpness(losses.chunked(loss, 4), params, batch, key=KEY),
        lambda loss, params, batch: curvature.gauss_newton(losses.chunked(loss, 4), params, batch),
        lambda loss, params, batch: curvature.sharpness(loss, params, in_two(batch), key=KEY),
        lambda loss, params, batch: curvature.hessian(loss, params, in_two(batch)),
        lambda loss, params, batch: per_example.gradients(loss, params, in_two(batch)),
        lambda loss, params, batch: learning_rate.analyse(loss, params, batch, key=KEY),
    ],
)
def test_what_takes_examples_apart_refuses_a_loss_that_couples_them(call):
    coupled, params, batch = problem(batch_normalised)
    with pytest.raises(ValueError, match="are its examples coupled"):
        call(coupled, params, batch)


def in_two(batch):
    return [jax.tree.map(lambda x: x[:5], batch), jax.tree.map(lambda x: x[5:], batch)]


def test_a_batch_that_is_taken_whole_may_couple_its_examples():
    coupled, params, batch = problem(batch_normalised)
    assert curvature.sharpness(coupled, params, batch, key=KEY).converged


def test_a_loss_that_closes_over_a_traced_value_is_not_looked_at():
    loss, params, batch = problem()

    def found(scale):
        scaled = losses.chunked(lambda p, b: scale * loss(p, b), 3)
        return curvature.hessian(scaled, params, batch) @ params, scaled(params, batch)

    chex.assert_trees_all_close(jax.jit(found)(2.0), found(2.0), rtol=1e-5)
