from typing import get_args

import jax
import numpy as np
import pytest

from jaxnet.contract import UserError
from jaxnet.lab import _task, analyse
from jaxnet.lab._task import TaskConfig, make_task, rate_of

KEY = jax.random.key(0)


def task(**config):
    return make_task(TaskConfig(**config), key=KEY)


def test_what_the_command_line_offers_is_what_is_there():
    for offered, there in (
        (analyse.Optimizer, analyse.OPTIMIZERS),
        (_task.Activation, _task.ACTIVATIONS),
        (_task.Criterion, ("auto", *_task.CRITERIA)),
        (_task.Model, _task.CHUNK),
    ):
        assert set(get_args(offered)) == set(there)


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


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [-2, 0, 7], [0, 1], [3, 3], [0.0, 1.0], [0.5, 2.25]]
)
def test_squared_error_takes_any_numbers_as_numbers(tmp_path, labels):
    """One output, whatever the values; the loss at params 0 is the mean of y²/2."""
    path = write(tmp_path / "a.csv", labels * 6)
    np.savez(tmp_path / "a.npz", x=np.ones((len(labels) * 6, 2)), y=np.array(labels * 6))
    for name in (path, str(tmp_path / "a.npz")):
        made = task(data=name, criterion="squared_error", model="linear")
        assert made.num_params == 3
        assert not made.labelled
        assert made.train[1].dtype == np.float32
        assert made.rows[-1] == ("outputs", 1, "numbers")
        zeros = jax.tree.map(lambda x: 0 * x, made.params)
        y = np.concatenate([made.train[1], made.test[1]])
        np.testing.assert_array_equal(np.sort(y), np.sort(labels * 6))
        np.testing.assert_allclose(made.loss(zeros, made.train), np.mean(np.square(made.train[1])) / 2, rtol=1e-6)


def test_what_auto_takes_targets_for_is_their_types_to_say(tmp_path):
    for labels, labelled, outputs, remark in (
        ([0, 1, 2], True, 3, "classes 0, 1, 2; with --criterion squared_error they are plain numbers"),
        ([0.0, 1.0, 2.0], False, 1, "numbers; with --criterion softmax_cross_entropy they are classes"),
        ([0.5, 1.0, 2.0], False, 1, "numbers"),
        (["b", "a", "c"], True, 3, "classes a, b, c"),
        (["True", "False"], True, 2, "classes 0, 1; with --criterion squared_error they are plain numbers"),
    ):
        made = task(data=write(tmp_path / "a.csv", labels * 6), widths=(3,))
        assert made.labelled is labelled
        assert made.rows[-1] == ("outputs", outputs, remark)
    assert task(data=write(tmp_path / "a.csv", [0.5, 1.25, 3.0, -2.0, 0.1]), widths=(3,)).test is None


@pytest.mark.parametrize("labels", [[1, 2, 3], [-1, 1, 7], [0.0, 5.0, 6.0], ["cat", "dog", "owl"]])
def test_a_cross_entropy_takes_them_as_classes(tmp_path, labels):
    made = task(data=write(tmp_path / "a.csv", labels * 6), criterion="softmax_cross_entropy", widths=(3,))
    y = np.concatenate([made.train[1], made.test[1]])
    np.testing.assert_array_equal(np.bincount(y), [6, 6, 6])
    zeros = jax.tree.map(lambda x: 0 * x, made.params)
    np.testing.assert_allclose(made.loss(zeros, made.train), np.log(3), rtol=1e-6)
    two = task(data=write(tmp_path / "a.csv", labels[:2] * 6), criterion="sigmoid_cross_entropy", widths=(3,))
    assert sorted(np.concatenate([two.train[1], two.test[1]])) == [0] * 6 + [1] * 6


def test_several_targets_are_an_output_each(tmp_path):
    (tmp_path / "a.csv").write_text("\n".join(["u,a,v,id", *(f"{i},{i * i % 7},{0.5 * i},{i}" for i in range(20))]))
    made = task(data=str(tmp_path / "a.csv"), target="u,v", drop="id", model="linear")
    assert made.num_params == 2 + 2
    assert not made.labelled
    assert made.rows[-1][:2] == ("outputs", 2)
    np.testing.assert_array_equal(made.train[1][:, 0], 2 * made.train[1][:, 1])
    zeros = jax.tree.map(lambda x: 0 * x, made.params)
    np.testing.assert_allclose(made.loss(zeros, made.train), np.square(made.train[1]).sum(axis=1).mean() / 2, rtol=1e-6)
    with pytest.raises(UserError, match="needs class labels"):
        task(data=str(tmp_path / "a.csv"), target="u,v", criterion="softmax_cross_entropy")


def test_targets_of_one_column_are_a_number_each(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((12, 2)), y=np.arange(12.0)[:, None] / 7)
    assert task(data=str(tmp_path / "a.npz"), model="linear").train[1].ndim == 1
    np.savez(tmp_path / "a.npz", x=np.ones((12, 2)), y=np.eye(3, dtype=int)[np.arange(12) % 3])
    assert task(data=str(tmp_path / "a.npz"), model="linear").train[1].shape == (9, 3)
    with pytest.raises(UserError, match="needs class labels, one whole number an example"):
        task(data=str(tmp_path / "a.npz"), criterion="softmax_cross_entropy")
    np.savez(tmp_path / "a.npz", x=np.ones((12, 2)), y=np.ones((12, 2, 2)))
    with pytest.raises(UserError, match=r"expected one number an example, or a row of them, got shape \(12, 2, 2\)"):
        task(data=str(tmp_path / "a.npz"))


def test_what_was_done_to_a_file_is_said(tmp_path):
    rows = [f"{i},{('red', 'blue')[i % 2]},{i / 3 if i != 4 else ''},{i % 2}" for i in range(30)]
    (tmp_path / "a.csv").write_text("\n".join([",colour,a,y", *rows]))
    made = task(data=str(tmp_path / "a.csv"), widths=(3,))
    said = [": ".join(map(str, row)) for row in made.rows]
    for words in (
        "is an index",
        "'colour' is 2 inputs",
        "rows left out, 1 of 30",
        "examples: 29: 23 to train on, 6 to",
    ):
        assert any(words in line for line in said), words
    assert "inputs: 3: each scaled to mean 0, variance 1 on the training examples (not with --no-standardise)" in said
    raw = task(data=str(tmp_path / "a.csv"), widths=(3,), standardise=False)
    assert ("inputs", 3, "as they are in the file") in raw.rows
    scaled = task(data=str(tmp_path / "a.csv"), widths=(3,), target="a", standardise_target=True)
    assert ("targets", 1, "scaled likewise") in scaled.rows


@pytest.mark.parametrize(
    ("labels", "config", "words"),
    [
        ([0] * 12, {}, "all 12 examples have the label 0"),
        ([1, 2, 3] * 4, {}, "expected 0…2 for 3 classes, got 1, 2, 3; renumber"),
        (["a", "b"] * 6, {"criterion": "squared_error"}, r"needs numbers, and the targets are words \(a, b\)"),
        (["a", "b"] * 6, {"standardise_target": True}, "words, which --standardise-target cannot scale"),
        (["a"] * 6, {}, "all 6 examples have the label a"),
        ([f"w{i}" for i in range(12)], {}, "each of the 12 examples has a class of its own"),
        ([2, 1, 0, 3, 5, 4], {}, "each of the 6 examples has a class of its own"),
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
