"""Data loaders of others in place of one batch; and what is told of one that changes from pass to pass."""

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import contract, curvature, dataset, learning_rate, losses, nn, per_example, training

KEY = jax.random.key(0)
N = 22


@pytest.fixture(scope="module")
def problem():
    model = nn.mlp([4, 3], activation=jnp.tanh)
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(N, 5)).astype(np.float32), rng.integers(0, 3, N)
    return losses.mean_loss(model.apply, losses.softmax_cross_entropy), model.init(KEY, (5,)), batch


class TorchStyle:
    """What a loader of PyTorch is to its user: examples one by one, collated and shuffled, pairs of arrays."""

    def __init__(self, batch, batch_size, *, shuffle=False, augment=None):
        self.examples, self.batch_size, self.augment = list(zip(*batch, strict=True)), batch_size, augment
        self.rng = np.random.default_rng(0) if shuffle or augment else None
        self.shuffle = shuffle

    def __len__(self):
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self):
        n = len(self.examples)
        order = self.rng.permutation(n) if self.shuffle else np.arange(n)
        for start in range(0, n, self.batch_size):
            inputs, targets = zip(*(self.examples[i] for i in order[start : start + self.batch_size]), strict=True)
            inputs = np.stack(inputs)
            yield [self.augment(self.rng, inputs) if self.augment else inputs, np.stack(targets)]


def grain_loader(batch, batch_size, **_):
    return grain.MapDataset.source(list(zip(*batch, strict=True))).batch(batch_size)


def grain_stream(batch, batch_size, **_):
    return grain_loader(batch, batch_size).to_iter_dataset()


MAKERS = {
    "list": lambda *args: list(TorchStyle(*args)),
    "torch": TorchStyle,
    "grain, MapDataset": grain_loader,
    "grain, IterDataset": grain_stream,
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_loader_serves_as_its_examples_in_one_batch_do(name, problem):
    """Ragged: the last of three batches of 9 has 4."""
    loss, params, batch = problem
    loader = MAKERS[name](batch, 9)
    of = lambda data: (
        curvature.hessian(loss, params, data) @ params,
        per_example.gradients(loss, params, data).variance(),
        per_example.gradients(loss, params, data).norms(),
        per_example.noise_scale(loss, params, data),
        training.fit(
            loss, params, data, optax.adam, learning_rate=0.01, batch_size=None, num_epochs=2, key=KEY
        ).history.loss,
    )
    chex.assert_trees_all_close(of(loader), of(batch), rtol=2e-4, atol=1e-5)


def shaken(rng, inputs):
    return inputs + rng.normal(size=inputs.shape).astype(inputs.dtype)


def test_a_loader_that_shuffles_gives_the_same_and_one_that_augments_is_told(problem):
    loss, params, batch = problem
    shuffling = TorchStyle(batch, 9, shuffle=True)
    expected, found = (per_example.noise_scale(loss, params, data) for data in (batch, shuffling))
    chex.assert_trees_all_close(found, expected, rtol=1e-4)
    augmenting = TorchStyle(batch, 9, augment=shaken)
    for needs_the_same in (
        lambda data: per_example.noise_scale(loss, params, data),
        lambda data: per_example.gradients(loss, params, data).variance(),
        lambda data: curvature.sharpness(loss, params, data, key=KEY),
        lambda data: curvature.gradient_covariance(loss, params, data) @ params,
        lambda data: learning_rate.greedy(loss, params, data),
        lambda data: learning_rate.analyse(loss, params, data, key=KEY),
        lambda data: training.fit(
            loss, params, batch, optax.sgd, learning_rate=0.1, batch_size=9, num_epochs=2, key=KEY, validation=data
        ),
    ):
        with pytest.raises(contract.UserError, match=r"other examples than the first \(22 and 22 of them\)"):
            needs_the_same(augmenting)
    # One pass each, or one that may differ.
    per_example.gradients(loss, params, augmenting).mean()
    for size in (9, None):
        training.fit(
            loss, params, augmenting, optax.sgd, learning_rate=0.1, batch_size=size, num_epochs=3, key=KEY,
            metrics={"loss": loss},
        )  # fmt: skip


def test_rows_that_belong_to_examples_need_their_order(problem):
    loss, params, batch = problem
    grads = per_example.gradients(loss, params, TorchStyle(batch, 9, shuffle=True))
    with pytest.raises(contract.UserError, match="in another order"):
        grads.weighted_sum(grads.norms())


def first_moment(batch):
    return jax.tree.map(lambda x: x.mean(axis=0), batch)


@pytest.mark.parametrize("change", ["one bit", "two rows' columns", "a row for another", "one more", "other leaves"])
def test_no_small_change_goes_unseen(change):
    x, y = np.arange(60, dtype=np.float32).reshape(20, 3), np.arange(20.0, dtype=np.float32)
    other = x.copy(), y.copy()
    if change == "one bit":
        other[0][3, 1] = np.nextafter(other[0][3, 1], np.inf)
    elif change == "two rows' columns":
        other[0][[2, 5], 1] = other[0][[5, 2], 1]
    elif change == "a row for another":
        other[0][7], other[1][7] = x[6], y[6]
    elif change == "one more":
        other = tuple(np.concatenate([a, a[:1]]) for a in other)
    else:
        other = (np.roll(x, 1, axis=1), y)
    passes = iter([[(x, y)], [(x[::-1], y[::-1])], [other]])

    class Changing:
        def __iter__(self):
            return iter(next(passes))

    stream = dataset.of(Changing())
    for _ in range(2):
        dataset.mean(first_moment, stream)
    with pytest.raises(contract.UserError, match="other examples"):
        dataset.mean(first_moment, stream)
