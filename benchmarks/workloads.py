"""Small, real training tasks, all offline: a network, data in two parts, a usual batch size and a number of epochs."""

import dataclasses
import hashlib
from collections.abc import Callable
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets

from jaxnet import data, losses, nn

# Of Python 3.11's documentation; another version's is another text, and another task.
TEXT_SHA256 = "0849da789c36d85942cba8009b70c7aee1cf216d8b572e6052684aeeefe1aabb"
TEXT_LENGTH, WINDOW = 200_000, 32


@dataclasses.dataclass(frozen=True)
class Workload:
    """A task: ``make(key) -> (loss, params)``, training and validation examples, and how it is usually trained.

    ``tuned`` is whether a rule's constants may be chosen on it; the others only report.
    """

    name: str
    network: Callable[[], nn.Layer]
    criterion: losses.Criterion
    examples: Callable[[], tuple[Any, Any]]
    batch_size: int
    num_epochs: int
    tuned: bool

    def start(self, key):
        """The loss, initial params, and the examples to train and to validate with."""
        train, held_out = self.examples()
        network = self.network()
        params = network.init(key, train[0].shape[1:])
        return losses.mean_loss(network.apply, self.criterion), params, train, held_out


def bundled(source, shape=None, num_train=None):
    """A set of `jaxnet.data`, its inputs brought to a shape."""

    def examples():
        parts = []
        for split in ("train", "test"):
            inputs, labels = source(split)
            parts.append((inputs if shape is None else inputs.reshape(-1, *shape), labels))
        train, held_out = parts
        return tuple(x[:num_train] for x in train), held_out

    return examples


def table(load):
    """One of scikit-learn's tables: columns, and targets that are no labels, of mean 0 and variance 1 in training."""

    def examples():
        inputs, targets = load(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(targets))
        inputs, targets = inputs[order], targets[order]
        num_train = len(targets) * 3 // 4
        standard = lambda x: (x - x[:num_train].mean(axis=0)) / x[:num_train].std(axis=0)
        inputs = jnp.asarray(standard(inputs), jnp.float32)
        labels = np.issubdtype(targets.dtype, np.integer)
        targets = jnp.asarray(targets, jnp.int32) if labels else jnp.asarray(standard(targets)[:, None], jnp.float32)
        return (inputs[:num_train], targets[:num_train]), (inputs[num_train:], targets[num_train:])

    return examples


def characters():
    """Windows of the standard library's documentation, and the next character at each of their places."""
    text = "".join(topics.topics.values())[:TEXT_LENGTH]
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != TEXT_SHA256:
        raise RuntimeError(f"pydoc_data.topics: expected the text of Python 3.11, got another (SHA-256 {found[:12]}…)")
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    codes = np.array([alphabet[character] for character in text])
    starts = np.random.default_rng(0).permutation(len(codes) // (WINDOW + 1)) * (WINDOW + 1)
    windows = codes[starts[:4000, None] + np.arange(WINDOW + 1)]
    inputs, targets = jnp.asarray(windows[:, :-1], jnp.int32), jnp.asarray(windows[:, 1:], jnp.int32)
    return (inputs[:3000], targets[:3000]), (inputs[3000:], targets[3000:])


def small_conv(channels, kernel_size, pool, num_classes=10):
    """Two convolutions with pooling, and a dense layer."""
    act = nn.activation(jax.nn.relu)
    half = [nn.conv(channels, kernel_size), act, nn.avg_pool(pool)]
    return nn.serial(*half, nn.conv(2 * channels, kernel_size), *half[1:], nn.flatten(), nn.dense(num_classes))


def residual_conv():
    """A small residual network: group norms, two blocks after a stem with stride 2."""
    act = nn.activation(jax.nn.relu)
    block = nn.residual(nn.serial(nn.group_norm(4), act, nn.conv(16), nn.group_norm(4), act, nn.conv(16)))
    stem = nn.conv(16, strides=2)
    return nn.serial(
        stem, block, nn.avg_pool(2), block, nn.group_norm(4), act, nn.avg_pool(7), nn.flatten(), nn.dense(10)
    )


def residual_mlp(num_outputs, features=64, num_blocks=3):
    """A residual perceptron with layer norms inside its branches."""
    branch = nn.serial(nn.layer_norm(), nn.dense(features), nn.activation(jax.nn.relu), nn.dense(features))
    blocks = [nn.residual(branch) for _ in range(num_blocks)]
    return nn.serial(nn.dense(features), *blocks, nn.layer_norm(), nn.dense(num_outputs))


def recurrent(vocabulary=100, features=64):
    """h_t = tanh(W_x E[x_t] + W_h h_{t−1} + b), logits W h_t + c at each place."""
    embed, inwards, outwards = nn.embed(vocabulary, features), nn.dense(features), nn.dense(vocabulary)

    def init(key, shape):
        keys = jax.random.split(key, 4)
        return {
            "embed": embed.init(keys[0], shape),
            "in": inwards.init(keys[1], (*shape, features)),
            "recur": jax.nn.initializers.orthogonal()(keys[2], (features, features)),
            "out": outwards.init(keys[3], (*shape, features)),
        }

    def apply(params, x, *, key=None):
        driven = inwards.apply(params["in"], embed.apply(params["embed"], x))

        def step(h, u):
            h = jnp.tanh(u + h @ params["recur"])
            return h, h

        start = jnp.zeros((x.shape[0], features), driven.dtype)
        states = jax.lax.scan(step, start, jnp.moveaxis(driven, 1, 0))[1]
        return outwards.apply(params["out"], jnp.moveaxis(states, 0, 1))

    return nn.Layer(init, apply)


def mlp(features, activation):
    return lambda: nn.mlp(features, activation=activation)


def small_transformer():
    return nn.transformer(100, features=32, num_heads=4, num_layers=2, hidden=128, max_length=WINDOW)


RELU, TANH, CROSS_ENTROPY = jax.nn.relu, jnp.tanh, losses.softmax_cross_entropy
DIGITS, MNIST1D = bundled(data.digits), bundled(data.mnist1d)
MNIST5K = bundled(data.mnist5k, num_train=2000)
CANCER, WINE, DIABETES = map(
    table, (sklearn.datasets.load_breast_cancer, sklearn.datasets.load_wine, sklearn.datasets.load_diabetes)
)

WORKLOADS = {
    w.name: w
    for w in [
        Workload("digits-relu", mlp([128, 128, 10], RELU), CROSS_ENTROPY, DIGITS, 32, 20, True),
        Workload("digits-tanh", mlp([128, 128, 10], TANH), CROSS_ENTROPY, DIGITS, 32, 20, False),
        Workload(
            "digits-conv",
            lambda: small_conv(8, 3, 2),
            CROSS_ENTROPY,
            bundled(data.digits, (8, 8, 1)),
            32,
            15,
            False,
        ),
        Workload("mnist1d-mlp", mlp([128, 128, 10], RELU), CROSS_ENTROPY, MNIST1D, 64, 20, True),
        Workload(
            "mnist1d-conv",
            lambda: small_conv(16, (5, 1), (2, 1)),
            CROSS_ENTROPY,
            bundled(data.mnist1d, (40, 1, 1)),
            64,
            20,
            False,
        ),
        Workload("mnist1d-residual", lambda: residual_mlp(10), CROSS_ENTROPY, MNIST1D, 64, 20, True),
        Workload("mnist5k-lenet", lambda: nn.lenet(10), CROSS_ENTROPY, MNIST5K, 64, 5, True),
        Workload("mnist5k-residual", residual_conv, CROSS_ENTROPY, MNIST5K, 64, 5, False),
        Workload("characters-transformer", small_transformer, CROSS_ENTROPY, characters, 32, 3, True),
        Workload("characters-recurrent", recurrent, CROSS_ENTROPY, characters, 32, 3, False),
        Workload("cancer-logistic", lambda: nn.dense(2), CROSS_ENTROPY, CANCER, 32, 30, False),
        Workload("wine-mlp", mlp([32, 3], TANH), CROSS_ENTROPY, WINE, 16, 40, True),
        Workload("diabetes-linear", lambda: nn.dense(1), losses.squared_error, DIABETES, 32, 30, True),
        Workload("diabetes-residual", lambda: residual_mlp(1, 32, 2), losses.squared_error, DIABETES, 32, 20, False),
    ]
}
# At a second batch size too, for as many examples.
SECOND_BATCH_SIZES = {"digits-relu": 256, "mnist1d-mlp": 8, "mnist5k-lenet": 8, "characters-transformer": 128}
