"""Orders by shards, and labels that have no loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import contract, data, losses, nn, training

KEY = jax.random.key(0)
MODEL = nn.dense(3)
LOSS = losses.mean_loss(MODEL.apply, losses.softmax_cross_entropy)
PARAMS = MODEL.init(KEY, (2,))
BATCH = (jax.random.normal(KEY, (12, 2)), jnp.arange(12) % 3)


def run(batch, loss=LOSS, **how):
    how = {"learning_rate": 0.1, "batch_size": 4, "num_epochs": 2, "key": KEY} | how
    return training.fit(loss, PARAMS, batch, optax.sgd, **how)


def test_a_step_takes_as_many_examples_of_each_shard():
    steps = [rows.tolist() for rows in data.batches(jnp.arange(12), 4, key=KEY, order=data.cyclic, num_shards=2)]
    assert steps == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    shuffled = np.stack(list(data.batches(jnp.arange(12), 4, key=KEY, num_shards=2)))
    assert sorted(shuffled[:, :2].ravel()) == list(range(6))
    assert sorted(shuffled[:, 2:].ravel()) == list(range(6, 12))


def test_fit_takes_the_steps_that_batches_gives():
    params = PARAMS
    for epoch in range(2):
        for batch in data.batches(BATCH, 8, key=KEY, epoch=epoch, num_shards=4):
            params = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, jax.grad(LOSS)(params, batch)))
    found = run(BATCH, batch_size=8, num_shards=4).state.params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found, params)


@pytest.mark.parametrize(("shards", "size"), [(5, None), (3, 4), (0, 4), (2.0, 4)])
def test_shards_divide_the_examples_and_the_batch(shards, size):
    with pytest.raises(contract.UserError, match="num_shards"):
        run(BATCH, batch_size=size, num_shards=shards)


@pytest.mark.parametrize("bad", [3, -1])
def test_a_label_out_of_range_is_named(bad):
    labels = BATCH[1].at[7].set(bad)
    with pytest.raises(contract.UserError, match=r"data: expected labels from 0 to 2.* 1 of 12 .* index 7"):
        run((BATCH[0], labels))
    with pytest.raises(contract.UserError, match="validation: expected labels"):
        run(BATCH, validation=(BATCH[0], labels))


def test_a_target_that_is_not_finite_is_named():
    loss = losses.chunked(losses.mean_loss(MODEL.apply, losses.squared_error), 5)
    with pytest.raises(contract.UserError, match=r"data: expected finite numbers as targets.* index 2"):
        run((BATCH[0], jnp.ones((12, 3)).at[2, 1].set(jnp.nan)), loss)
    binary = losses.mean_loss(MODEL.apply, losses.sigmoid_cross_entropy)
    with pytest.raises(contract.UserError, match="labels from 0 to 1"):
        run((BATCH[0], -jnp.ones((12, 3))), binary)
