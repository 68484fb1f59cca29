import jax
import numpy as np
import pytest

from jaxnet.contract import UserError
from jaxnet.lab._task import TaskConfig, make_task, rate_of

KEY = jax.random.key(0)


def task(**config):
    return make_task(TaskConfig(**config), key=KEY)


@pytest.mark.parametrize("data", ["digits", "two-gaussians", "mnist1d", "mnist5k"])
@pytest.mark.parametrize("criterion", ["auto", "squared_error", "softmax_cross_entropy"])
def test_every_set_meets_every_criterion(data, criterion):
    made = task(data=data, criterion=criterion, widths=(4,))
    value = made.loss(made.params, made.train)
    assert value.shape == ()
    assert np.isfinite(value)
    assert np.isfinite(made.loss(made.params, made.test))


@pytest.mark.parametrize(
    ("data", "criterion"), [("digits", "auto"), ("mnist5k", "squared_error"), ("digits", "squared_error")]
)
def test_lenet_and_linear(data, criterion):
    for model in ("lenet", "linear"):
        made = task(data=data, model=model, criterion=criterion)
        assert np.isfinite(made.loss(made.params, jax.tree.map(lambda x: x[:5], made.train)))


def test_two_gaussians_is_the_lectures_neuron():
    made = task(data="two-gaussians", model="linear")
    assert made.num_params == 3
    assert made.train[1].shape == (100,)
    labels = task(data="two-gaussians", model="linear", criterion="sigmoid_cross_entropy").train[1]
    assert sorted(set(labels.tolist())) == [0, 1]


def write(path, labels, n=None):
    n = len(labels) if n is None else n
    rng = np.random.default_rng(0)
    lines = ["a,b,label"] + [f"{rng.normal():.3f},7,{label}" for label in labels]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_csv_is_standardised_by_its_training_part(tmp_path):
    made = task(data=write(tmp_path / "a.csv", [0, 1] * 20), widths=(3,))
    assert len(made.train[1]) == 32
    assert len(made.test[1]) == 8
    np.testing.assert_allclose(made.train[0].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(made.train[0][:, 0].std(), 1, rtol=1e-5)
    np.testing.assert_array_equal(made.train[0][:, 1], 0)  # a constant column stays finite
    raw = task(data=str(tmp_path / "a.csv"), widths=(3,), standardise=False)
    np.testing.assert_array_equal(raw.train[0][:, 1], 7)


def test_a_column_of_large_numbers_is_standardised_before_it_is_rounded(tmp_path):
    rows = [f"{1.7e12 + i:.0f},{i % 2}" for i in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["time,label", *rows]))
    made = task(data=str(tmp_path / "a.csv"), widths=(3,))
    np.testing.assert_allclose(made.train[0].std(), 1, rtol=1e-5)
    assert len(np.unique(made.train[0])) == 32


def test_plain_numbers_are_regression(tmp_path):
    made = task(data=write(tmp_path / "a.csv", [0.5, 1.25, 3.0, -2.0, 0.1]), widths=(3,))
    assert not made.labelled
    assert made.test is None
    assert task(data=write(tmp_path / "b.csv", [10, 200, 31, 4]), criterion="squared_error", widths=(3,)).train[
        1
    ].shape == (4,)


@pytest.mark.parametrize(
    ("labels", "config", "words"),
    [
        ([0] * 12, {}, "all 12 examples have the label 0"),
        ([1, 2, 3] * 4, {}, "expected 0…2 for 3 classes, got 1, 2, 3; renumber"),
        ([-1, 1] * 6, {}, "labels are out of range"),
        ([0.5, 1.5, 0, 1], {"criterion": "softmax_cross_entropy"}, "needs class labels"),
        ([0, 1, 2] * 4, {"criterion": "sigmoid_cross_entropy"}, "two classes"),
        ([0, 1], {}, "3 examples or more"),
        ([0, 1] * 6, {"model": "lenet"}, "lenet needs images"),
        ([0, 1] * 6, {"target": "nope"}, "no column named 'nope'"),
    ],
)
def test_data_that_does_not_fit(tmp_path, labels, config, words):
    with pytest.raises(ValueError, match=words):
        task(data=write(tmp_path / "a.csv", labels), **config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"data": "imagenet"},
            "unknown data 'imagenet': known are digits, two-gaussians, mnist1d, mnist5k, or the path",
        ),
        ({"model": "resnet"}, "unknown model 'resnet': known are linear, mlp, lenet"),
        ({"activation": "step"}, "unknown activation 'step': known are tanh, relu"),
        ({"criterion": "hinge"}, "unknown criterion 'hinge': known are auto, softmax"),
        ({"widths": (4, 0)}, "widths"),
    ],
)
def test_unknown_names(config, words):
    with pytest.raises(ValueError, match=words):
        task(**config)


@pytest.mark.parametrize("rate", [0.0, np.inf, np.nan])
def test_a_rate_that_nothing_can_train_at_is_told_in_words(rate):
    class Found:
        def rate(self, batch_size):
            return rate

    with pytest.raises(UserError, match=f"no rate for B = 4 follows .* it would be {rate:.3g}; rescale the data"):
        rate_of(Found(), 4)
