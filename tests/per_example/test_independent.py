import jax
import jax.numpy as jnp
import pytest

from jaxnet import losses, nn, per_example

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
    with pytest.raises(ValueError, match="its gradient on 4 examples"):
        per_example.check_independent(sneaky, params, batch)
    with pytest.raises(ValueError, match="expected a real scalar"):
        per_example.check_independent(lambda p, b: b[0] @ p[0]["kernel"], params, batch)
