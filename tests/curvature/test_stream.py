import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import curvature

KEY = jax.random.key(3)


class Loader:
    """A data set read batch by batch, anew at each pass; the last batch is short."""

    def __init__(self, batch, size, moved=0.0):
        self.batch, self.size, self.moved, self.passes = batch, size, moved, 0

    def __iter__(self):
        self.passes += 1
        for first in range(0, len(self.batch[1]), self.size):
            inputs, targets = (np.asarray(x)[first : first + self.size] for x in self.batch)
            yield inputs + self.moved * self.passes, targets


@pytest.mark.parametrize("make", [curvature.hessian, curvature.gauss_newton, curvature.empirical_fisher])
def test_a_product_over_ragged_batches_is_that_of_the_whole(make, mlp_problem):
    loss, params, batch = mlp_problem
    v = jax.tree.map(jnp.ones_like, params)
    chex.assert_trees_all_close(make(loss, params, Loader(batch, 5))(v), make(loss, params, batch)(v), rtol=1e-10)


def test_the_search_over_batches_is_the_search_over_the_whole(mlp_problem):
    loss, params, batch = mlp_problem
    whole = curvature.sharpness(loss, params, batch, key=KEY, tol=1e-8)
    loader = Loader(batch, 5)
    streamed = curvature.sharpness(loss, params, loader, key=KEY, tol=1e-8)
    np.testing.assert_allclose(streamed.value, whole.value, rtol=1e-8)
    np.testing.assert_allclose(streamed.upper_bound, whole.upper_bound, rtol=1e-5)
    assert int(streamed.num_matvecs) == int(whole.num_matvecs)
    # One pass a product, two to see that the batches stay the same, and two begun: whether its examples couple, and
    # which derivatives it has.
    assert loader.passes == int(streamed.num_matvecs) + 4


def test_a_list_of_batches_is_a_stream_and_a_list_of_arrays_is_a_batch(mlp_problem):
    loss, params, batch = mlp_problem
    parts = [tuple(x[rows] for x in batch) for rows in (slice(0, 7), slice(7, 12))]
    found = curvature.eigsh(curvature.hessian(loss, params, parts), 2, key=KEY, tol=1e-8)
    dense = curvature.materialize(curvature.hessian(loss, params, batch))
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(dense)[:-3:-1], rtol=1e-7)
    v = jax.tree.map(jnp.ones_like, params)
    chex.assert_trees_all_close(
        curvature.hessian(loss, params, list(batch))(v), curvature.hessian(loss, params, batch)(v)
    )


def test_batches_that_change_are_refused(mlp_problem):
    loss, params, batch = mlp_problem
    with pytest.raises(ValueError, match="other examples than the first"):
        curvature.sharpness(loss, params, Loader(batch, 5, moved=0.1), key=KEY)


def test_an_iterator_and_an_empty_stream_are_refused(mlp_problem):
    loss, params, batch = mlp_problem
    with pytest.raises(TypeError, match="iterator, which ends after one pass"):
        curvature.hessian(loss, params, iter(Loader(batch, 5)))
    with pytest.raises(ValueError, match="at least one batch"):
        curvature.sharpness(loss, params, Loader(tuple(x[:0] for x in batch), 5), key=KEY)
    for function in (curvature.spectral_density, curvature.trace, curvature.diagonal):
        with pytest.raises(TypeError, match="needs one batch in memory"):
            function(curvature.hessian(loss, params, Loader(batch, 5)), key=KEY)
    with pytest.raises(TypeError, match="subsample: needs one batch in memory"):
        curvature.sharpness(loss, params, Loader(batch, 5), key=KEY, subsample=3)


def test_a_random_loss_is_refused(mlp_problem):
    """A key or a generator that moves while the loss is traced."""
    loss, params, batch = mlp_problem
    rng, keys, kept = np.random.default_rng(0), iter(list(jax.random.split(KEY, 100))), []

    def noisy(draw):
        return lambda p, b: loss(jax.tree.map(lambda x: x * draw(x), p), b)

    def leaking(x):
        kept.append(kept[-1] * x.sum() if kept else x.sum())
        return kept[-1]

    for draw in (
        lambda x: rng.normal(size=x.shape),
        lambda x: rng.normal(),
        lambda x: jax.random.bernoulli(next(keys), 0.5, x.shape),
        leaking,
    ):
        with pytest.raises(ValueError, match="loss: .* fix its dropout key"):
            curvature.sharpness(noisy(draw), params, batch, key=KEY)
    mask = rng.normal(size=100)
    for draw in (lambda x: mask[: x.shape[-1]], lambda x: jax.random.bernoulli(KEY, 0.5, x.shape)):
        assert bool(curvature.sharpness(noisy(draw), params, batch, key=KEY).converged)


def test_a_random_loss_that_is_fixed_by_the_batch_is_accepted(mlp_problem):
    loss, params, batch = mlp_problem
    keys = jax.random.split(KEY, len(batch[1]))

    def dropped(params, batch):
        inputs, targets, keys = batch
        kept = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, inputs.shape[1:]))(keys)
        return loss(params, (inputs * kept, targets))

    found = curvature.sharpness(dropped, params, (*batch, keys), key=KEY, tol=1e-8)
    flat, unravel = ravel_pytree(params)
    dense = jax.jit(jax.hessian(lambda w: dropped(unravel(w), (*batch, keys))))(flat)
    np.testing.assert_allclose(found.value, np.linalg.eigvalsh(dense)[-1], rtol=1e-7)
