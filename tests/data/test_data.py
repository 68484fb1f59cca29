import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import data, training

KEY = jax.random.key(3)


def test_two_gaussians_exact_has_the_hessian_of_the_lectures(x64):
    inputs, targets = data.two_gaussians_exact()
    assert inputs.shape == (100, 2)
    np.testing.assert_allclose(np.linalg.eigvalsh(inputs.T @ inputs / 100), [0.04, 0.84], atol=1e-14)
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=1e-15)
    np.testing.assert_allclose(inputs.T @ targets / 100, [0.4, 0.8], atol=1e-15)
    assert sorted(set(targets.tolist())) == [-1, 1]


def test_two_gaussians_has_their_moments():
    inputs, targets = data.two_gaussians(key=KEY, num_examples=20000)
    signed = inputs * targets[:, None]
    np.testing.assert_allclose(signed.mean(axis=0), [0.4, 0.8], atol=0.01)
    np.testing.assert_allclose(signed.std(axis=0), 0.2, rtol=0.03)
    again, _ = data.two_gaussians(key=KEY, num_examples=20000)
    np.testing.assert_array_equal(inputs, again)


@pytest.mark.parametrize("n", [3, 2, 0])
def test_two_gaussians_need_two_equal_classes(n):
    with pytest.raises(ValueError, match="even number"):
        data.two_gaussians_exact(n)


@pytest.mark.parametrize(
    ("load", "shape", "total"),
    [(data.digits, (64,), 1797), (data.mnist1d, (40,), 5000), (data.mnist5k, (28, 28, 1), 5000)],
)
def test_bundled_sets(load, shape, total):
    (x, y), (xt, yt), (xa, ya) = load("train"), load("test"), load("all")
    assert x.shape[1:] == xt.shape[1:] == xa.shape[1:] == shape
    assert len(x) + len(xt) == len(xa) == len(ya) == total
    assert len(x) == total * 4 // 5
    np.testing.assert_array_equal(jnp.concatenate([y, yt]), ya)
    np.testing.assert_array_equal(jnp.concatenate([x, xt]), xa)
    assert set(np.unique(y).tolist()) == set(range(10))
    assert np.isfinite(x).all()
    with pytest.raises(ValueError, match="train, test, all"):
        load("validation")


def test_digits_are_centred_by_their_training_mean():
    raw = data.digits(centre=False)[0]
    np.testing.assert_allclose(data.digits()[0], raw - raw.mean(axis=0), atol=1e-6)
    assert raw.min() == 0
    assert raw.max() == 1
    np.testing.assert_allclose(
        data.digits("test")[0], data.digits("test", centre=False)[0] - raw.mean(axis=0), atol=1e-6
    )


def test_mnist1d_leaves_numpys_global_stream_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    data.mnist1d()
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("order", [data.reshuffled, data.cyclic])
def test_an_epoch_sees_every_example_once(order):
    for epoch in range(3):
        assert sorted(order(KEY, epoch, 17).tolist()) == list(range(17))


def test_orders_are_functions_of_the_key_and_the_epoch():
    for order in (data.reshuffled, data.independent):
        assert (order(KEY, 1, 50) == order(KEY, 1, 50)).all()
        assert (order(KEY, 1, 50) != order(KEY, 2, 50)).any()
        assert (order(KEY, 1, 50) != order(jax.random.key(4), 1, 50)).any()
    drawn = data.independent(KEY, 0, 1000)
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    # With replacement 1/e of the examples are left out.
    np.testing.assert_allclose(len(np.unique(drawn)) / 1000, 1 - np.exp(-1), atol=0.04)


def test_batches_are_those_of_fit():
    batch = data.two_gaussians_exact(20)
    loss = lambda w, b: jnp.mean(0.5 * (b[0] @ w - b[1]) ** 2)
    w = jnp.zeros(2)
    for epoch in range(2):
        for part in data.batches(batch, 3, key=KEY, epoch=epoch):
            w = w - 0.2 * jax.grad(loss)(w, part)
    fitted = training.fit(loss, jnp.zeros(2), batch, optax.sgd, learning_rate=0.2, batch_size=3, num_epochs=2, key=KEY)
    np.testing.assert_allclose(fitted.state.params, w, rtol=1e-5)


def test_batches_cover_the_data():
    batch = (jnp.arange(10), jnp.arange(10) * 2)
    parts = list(data.batches(batch, 4, key=KEY))
    assert [len(x) for x, _ in parts] == [4, 4, 2]
    assert sorted(jnp.concatenate([x for x, _ in parts]).tolist()) == list(range(10))
    assert all((y == 2 * x).all() for x, y in parts)
    assert [len(x) for x, _ in data.batches(batch, 4, key=KEY, drop_last=True)] == [4, 4]
    for size in (0, 11):
        with pytest.raises(ValueError, match="1 to 10"):
            data.batches(batch, size, key=KEY)


def test_repeated_is_one_copy_after_the_other():
    x, y = data.repeated((jnp.arange(3), jnp.arange(6).reshape(3, 2)), 2)
    assert x.tolist() == [0, 1, 2, 0, 1, 2]
    assert y.shape == (6, 2)
    with pytest.raises(ValueError, match="times"):
        data.repeated((jnp.arange(3),), 0)


def test_with_keys_gives_each_example_its_own():
    inputs, targets, keys = data.with_keys(KEY, (jnp.ones((4, 2)), jnp.ones(4)))
    assert len(set(map(tuple, jax.random.key_data(keys).tolist()))) == 4
