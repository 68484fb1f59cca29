import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import per_example


def in_batches(batch, *ends):
    starts = (0, *ends)
    return [tuple(x[a:b] for x in batch) for a, b in zip(starts, (*ends, None), strict=True)]


def test_moments_over_ragged_batches_are_those_of_the_whole(mlp_problem):
    loss, params, batch = mlp_problem
    streamed = per_example.gradients(loss, params, in_batches(batch, 5, 6))
    whole = per_example.gradients(loss, params, batch)
    assert streamed.num_examples == 12
    for name in ("mean", "second_moment", "variance", "norms"):
        chex.assert_trees_all_close(getattr(streamed, name)(), getattr(whole, name)(), rtol=1e-10, atol=1e-14)
    for name in ("vdot", "distances"):
        chex.assert_trees_all_close(getattr(streamed, name)(params), getattr(whole, name)(params), rtol=1e-10)


def test_the_noise_scale_of_a_data_set_in_batches(mlp_problem):
    loss, params, batch = mlp_problem
    streamed = per_example.noise_scale(loss, params, in_batches(batch, 7))
    chex.assert_trees_all_close(streamed, per_example.noise_scale(loss, params, batch), rtol=1e-9)


def test_too_few_examples_are_refused(mlp_problem):
    loss, params, batch = mlp_problem
    two = in_batches(jax.tree.map(lambda x: x[:2], batch), 1)
    with pytest.raises(ValueError, match="3 examples or more, got 2"):
        per_example.noise_scale(loss, params, two)
    with pytest.raises(ValueError, match="two examples"):
        per_example.gradients(loss, params, two[:1]).variance()
    with pytest.raises(ValueError, match="at least one"):
        per_example.gradients(loss, params, [jax.tree.map(jnp.asarray, (np.ones((0, 5)), np.ones(0)))])
