"""A task from words: data, network and criterion, put together as one loss with its params."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import contract, data, losses, nn
from jaxnet.contract import Array, Loss, UserError
from jaxnet.lab._devices import on_devices, shared
from jaxnet.lab._own import of_ones_own
from jaxnet.learning_rate import Analysis
from jaxnet.losses import Apply

# What the command line offers. In Python a configuration may hold any word, which `known` refuses.
Model = Literal["linear", "mlp", "lenet"]
Activation = Literal["tanh", "relu", "gelu", "sigmoid", "silu", "softplus"]
Criterion = Literal["auto", "softmax_cross_entropy", "sigmoid_cross_entropy", "squared_error"]
DType = Literal["float32", "float64"]

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
}
CRITERIA: dict[Criterion, losses.Criterion] = {
    "softmax_cross_entropy": losses.softmax_cross_entropy,
    "squared_error": losses.squared_error,
    "sigmoid_cross_entropy": losses.sigmoid_cross_entropy,
}
DATA = ("digits", "two-gaussians", "mnist1d", "mnist5k")
# What counts is bounded, so that a slip of the keyboard is answered at once and in words.
MOST, MOST_PARAMS = 10**6, 10**9
# A file with more is read as a sample of its rows: in double precision, a copy or two, and the words that they were.
MOST_NUMBERS = 2**24
# Examples at a time: a convolution's patches are 25 times its images.
CHUNK = {"linear": 2000, "mlp": 2000, "lenet": 100}

# With more examples than this, what takes many passes over the data takes the first half as many: on a CPU all of them
# would take minutes.
MANY_EXAMPLES = 2000


def known(kind: str, name: str, names: Any) -> str:
    """``name``, if it is one of ``names``.

    Raises:
      UserError: it is not; the message lists them.
    """
    if name not in names:
        raise UserError(f"unknown {kind} {name!r}: known are {', '.join(names)}")
    return name


def check_seed(seed: int) -> None:
    """Raise unless ``seed`` is one that `jax.random.key` tells from others."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: expected a whole number from 0 to 4294967295, got {seed}")


def check_count(name: str, value: int, lowest: int = 1, highest: int = MOST) -> None:
    """Raise a `UserError` unless ``value`` is in lowest…highest."""
    if not lowest <= value <= highest:
        raise UserError(f"{name}: expected {lowest} to {highest}, got {value}")


def check_own_rate(rate: float | None, dtype: str) -> None:
    """Raise a `UserError` unless a rate of one's own, if there is one, is positive and finite."""
    limits = np.finfo(dtype)
    if rate is not None and not float(limits.tiny) <= rate <= float(limits.max):
        raise UserError(f"learning_rate: expected positive and finite in {dtype}, got {rate}")


def rate_of(analysis: Analysis, batch_size: int | None) -> float:
    """The rate to train at with batches of B.

    Raises:
      UserError: none follows from the data: λ_max is so small that its inverse overflows, or there is no gradient.
    """
    return checked_rate(float(analysis.rate(batch_size)), batch_size)


def checked_rate(rate: float, batch_size: int | None) -> float:
    """The rate that was derived for batches of B, if one can train at it.

    Raises:
      UserError: as `rate_of`.
    """
    if not 0 < rate < np.inf:
        batch = "the full batch" if batch_size is None else f"B = {batch_size}"
        raise UserError(
            f"no rate for {batch} follows from curvature and noise at the initial parameters, it would be {rate:.3g}; "
            "rescale the data, or take another seed"
        )
    return rate


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What is learned, and by which network."""

    data: str = "digits"
    """digits, two-gaussians, mnist1d, mnist5k, or the path of an .npz, .csv or .tsv file."""
    model: Model = "mlp"
    """The network."""
    widths: tuple[int, ...] = (128, 128)
    """Widths of the mlp's hidden layers."""
    activation: Activation = "tanh"
    """Of the hidden layers."""
    criterion: Criterion = "auto"
    """softmax_cross_entropy or sigmoid_cross_entropy: targets are classes.
    squared_error: a file's targets are numbers; the digits of a built-in set are one-hot.
    auto: softmax_cross_entropy for words and for integers 0, 1, 2, …, else squared_error."""
    inputs: str = "x"
    """For an .npz file: the name of its array of inputs."""
    targets: str = "y"
    """For an .npz file: the name of its array of targets."""
    target: str | None = None
    """For a .csv or .tsv file: the column of targets, or several with commas between; by default the last."""
    drop: str | None = None
    """For a .csv or .tsv file: the column to leave out, or several with commas between."""
    standardise: bool = True
    """For a file: scale each input to mean 0 and variance 1 over the training examples."""
    standardise_target: bool = False
    """For a file whose targets are numbers: scale them likewise."""
    loss: str | None = None
    """A loss of your own, loss(params, batch), as module:name, with --params and --batch; in place of data, model."""
    params: str | None = None
    """Its params as module:name, a pytree or a function without arguments that makes it."""
    batch: str | None = None
    """Its examples, likewise."""
    seed: int = 0
    """Of the initial parameters, the data's order and all random vectors."""
    dtype: DType = "float32"
    """Of all computations."""
    devices: int | None = None
    """So many devices, each with its part of the examples: of a CPU so many are made, of others the first are taken."""


def keys_of(config: TaskConfig, count: int) -> Array:
    """So many keys from the configuration's seed.

    Raises:
      UserError: the seed or the dtype is none that can be used.
    """
    known("dtype", config.dtype, get_args(DType))
    check_seed(config.seed)
    return jax.random.split(jax.random.key(config.seed), count)


@dataclasses.dataclass(frozen=True)
class Task:
    """One loss, where it starts, and what it is a mean over.

    Attributes:
      loss: ``loss(params, batch)``, chunked so that large sets fit the cache and the memory.
      apply: the network; None of a loss of one's own.
      params: the network's initial parameters.
      train: ``(inputs, targets)`` to train on; of a loss of one's own, its batch.
      test: ``(inputs, targets)`` held out, or None where there are too few examples.
      labelled: whether the targets are classes, so that `accuracy` means something.
      title: what it is.
      rows: of the job's table: what was taken from the data, as what.
      digest: of the examples: a file may have changed while a job lay still.
    """

    loss: Loss
    apply: Apply | None
    params: Any
    train: Any
    test: tuple[Array, Array] | None
    labelled: bool
    title: str
    rows: list[tuple[str, Any, str]]
    digest: str

    @property
    def num_params(self) -> int:
        """How many numbers the params hold."""
        return sum(x.size for x in jax.tree.leaves(self.params))

    @property
    def num_examples(self) -> int:
        """N, of those to train on."""
        return contract.num_examples(self.train)

    @property
    def sample(self) -> Any:
        """The training examples that costly measurements take: all, or the first of many."""
        if self.num_examples <= MANY_EXAMPLES:
            return self.train
        return jax.tree.map(lambda x: x[: MANY_EXAMPLES // 2], self.train)


def make_task(config: TaskConfig, *, key: Array) -> Task:
    """The task that ``config`` names; ``key`` draws the params, and the points of two-gaussians.

    Raises:
      UserError: a name is unknown, a file or package is missing, or the parts do not
        fit; in one line, with the mend.
    """
    if config.loss or config.params or config.batch:
        loss, params, batch = of_ones_own(loss=config.loss, params=config.params, batch=config.batch)
        digest, rows = _digest(batch), []
        if shared(config.devices):
            params, batch, _, row = on_devices(config.devices, params, batch, None)
            rows.append(row)
        return Task(loss, None, params, batch, None, False, str(config.loss), rows, digest)
    known("model", config.model, get_args(Model))
    known("activation", config.activation, ACTIVATIONS)
    activation = ACTIVATIONS[config.activation]
    known("criterion", config.criterion, get_args(Criterion))
    for width in config.widths:
        check_count("widths", width)
    data_key, init_key = jax.random.split(key)
    own, held_out, words, rows = _load(config, data_key)
    targets = np.concatenate([part[1] for part in (own, held_out) if part is not None])
    reading = _reading(config, targets, words)
    fit_inputs, network = _network(config, activation, own[0].shape[1:], reading.num_outputs)
    fitted = lambda part: (fit_inputs(part[0]), reading.fit(part[1]))
    train, test = fitted(own), None if held_out is None else fitted(held_out)
    loss = losses.chunked(losses.mean_loss(network.apply, CRITERIA[reading.criterion]), CHUNK[config.model])
    shapes = jax.eval_shape(lambda key: network.init(key, train[0].shape[1:]), init_key)
    check_count("widths: the network's parameters", sum(x.size for x in jax.tree.leaves(shapes)), highest=MOST_PARAMS)
    params = network.init(init_key, train[0].shape[1:])
    digest = _digest((train, test))
    if shared(config.devices):
        params, train, test, row = on_devices(config.devices, params, train, test)
        rows.append(row)
    name = pathlib.Path(config.data).name
    title = f"{name}, {config.model}, {reading.criterion.replace('_', ' ')}"
    rows.append(("outputs", reading.num_outputs or 1, reading.remark))
    return Task(loss, network.apply, params, train, test, reading.labelled, title, rows, digest)


def _digest(examples: Any) -> str:
    """Of examples in this process, before they are parted among several."""
    leaves = jax.tree.leaves(examples)
    return hashlib.blake2b(b"".join(np.asarray(x).tobytes() for x in leaves), digest_size=16).hexdigest()


Pair = tuple[Array, np.ndarray]


def _load(
    config: TaskConfig, key: Array
) -> tuple[Pair, Pair | None, tuple[str, ...] | None, list[tuple[str, Any, str]]]:
    """To train on and to test on, the words that targets stand for, and what there is to say of a file."""
    if config.data in DATA:
        if config.data == "two-gaussians":
            train, test = (data.two_gaussians(key=k) for k in jax.random.split(key))
        else:
            train, test = (getattr(data, config.data)(split) for split in ("train", "test"))
        return (train[0], np.asarray(train[1])), (test[0], np.asarray(test[1])), None, []
    path = pathlib.Path(config.data)
    try:
        if not path.suffix and not path.exists():
            raise UserError(
                f"unknown data {config.data!r}: known are {', '.join(DATA)}, or the path of an .npz or .csv file"
            )
        found = data.read(
            path,
            inputs=config.inputs,
            targets=config.targets,
            target=config.target,
            drop=config.drop,
            most_numbers=MOST_NUMBERS,
        )
    except OSError as error:
        # The system's own errors carry a number, and the path at their end.
        raise UserError(f"{path}: {error.strerror}" if error.errno else str(error)) from error
    x, y = found.inputs, found.targets
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    n = len(x)
    if n < 3:
        raise UserError(f"{path}: expected 3 examples or more, got {n}")
    order = np.random.default_rng(0).permutation(n)
    num_train = n if n < 10 else n * 4 // 5
    first, rest = order[:num_train], order[num_train:]
    scaled = "as they are in the file"
    if config.standardise:
        # Before the cast: in single precision a column of large numbers is a constant.
        mean, scale = x[first].mean(axis=0), x[first].std(axis=0)
        x = (x - mean) / np.where(scale > 1e-12 * np.abs(mean), scale, 1)
        scaled = "each scaled to mean 0, variance 1 on the training examples (not with --no-standardise)"
    if config.standardise_target:
        if found.words:
            raise UserError(f"{path}: its targets are words, which --standardise-target cannot scale")
        mean, scale = y[first].mean(axis=0), y[first].std(axis=0)
        y = (y - mean) / np.where(scale > 1e-12 * np.abs(mean), scale, 1)
    dtype = jnp.result_type(float)
    if max(np.abs(x).max(), np.abs(y).max()) > jnp.finfo(dtype).max:
        raise UserError(f"{path}: holds numbers too large for {dtype}; rescale them, or use --dtype float64")
    rows: list[tuple[str, Any, str]] = [("read", "", note) for note in found.notes]
    rows.append(("examples", n, f"{num_train} to train on, {n - num_train} to test"))
    rows.append(("inputs", math.prod(x.shape[1:]), scaled))
    if config.standardise_target:
        rows.append(("targets", math.prod(y.shape[1:]), "scaled likewise"))
    inputs = jnp.asarray(x, dtype)
    return (inputs[first], y[first]), ((inputs[rest], y[rest]) if rest.size else None), found.words, rows


class _Reading(NamedTuple):
    """What targets mean: by their criterion and their type, never by their values."""

    criterion: Criterion
    fit: Callable[[np.ndarray], Array]
    """Targets to the criterion's form."""
    num_outputs: int | None
    """None: one output, without an axis of its own."""
    labelled: bool
    remark: str


def _reading(config: TaskConfig, targets: np.ndarray, words: tuple[str, ...] | None) -> _Reading:
    whole = targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer)
    criterion = config.criterion
    if criterion == "auto":
        criterion = "softmax_cross_entropy" if whole else "squared_error"
    if criterion == "squared_error":
        return _numbers(config, targets, words)
    if targets.ndim != 1 or (targets != np.round(targets)).any():
        raise UserError(f"{criterion} needs class labels, one whole number an example; use --criterion squared_error")
    found = np.unique(targets)
    shown = ", ".join(map(str, (words or found)[:6])) + (", …" if len(found) > 6 else "")
    if len(found) < 2:
        raise UserError(f"targets: all {len(targets)} examples have the label {shown}; at least two classes are needed")
    if config.criterion == "auto" and not np.array_equal(found, np.arange(len(found))):
        raise UserError(
            f"targets: labels are out of range: expected 0…{len(found) - 1} for {len(found)} classes, got {shown}; "
            "renumber them, or say what they are: --criterion squared_error for plain numbers, softmax_cross_entropy "
            "for classes"
        )
    if len(found) == len(targets):
        raise UserError(f"targets: each of the {len(found)} examples has a class of its own; name another target")
    label = lambda y: np.searchsorted(found, y)
    remark = f"classes {shown}"
    if config.criterion == "auto" and not words and config.data not in DATA:
        remark += "; with --criterion squared_error they are plain numbers"
    if criterion == "softmax_cross_entropy":
        return _Reading(criterion, lambda y: jnp.asarray(label(y), jnp.int32), len(found), True, remark)
    if len(found) != 2:
        raise UserError(f"sigmoid_cross_entropy needs two classes, got {len(found)}; use softmax_cross_entropy")
    return _Reading(criterion, lambda y: jnp.asarray(label(y), jnp.result_type(float)), None, False, remark)


def _numbers(config: TaskConfig, targets: np.ndarray, words: tuple[str, ...] | None) -> _Reading:
    if words:
        raise UserError(
            f"squared_error needs numbers, and the targets are words ({', '.join(words[:6])}); use "
            "--criterion softmax_cross_entropy, or write them as numbers"
        )
    dtype = jnp.result_type(float)
    if config.data in DATA and np.issubdtype(targets.dtype, np.integer):
        k = int(targets.max()) + 1
        return _Reading("squared_error", lambda y: jax.nn.one_hot(y, k, dtype=dtype), k, True, "one-hot classes")
    if targets.ndim > 2:
        raise UserError(f"targets: expected one number an example, or a row of them, got shape {targets.shape}")
    remark = "numbers"
    if config.criterion == "auto" and targets.ndim == 1 and (targets == np.round(targets)).all():
        remark = "numbers; with --criterion softmax_cross_entropy they are classes"
    num_outputs = None if targets.ndim == 1 else targets.shape[1]
    return _Reading("squared_error", lambda y: jnp.asarray(y, dtype), num_outputs, False, remark)


def _single_output(y: Array) -> Array:
    return y[..., 0]


def _network(
    config: TaskConfig, activation: Callable[[Array], Array], shape: tuple[int, ...], num_outputs: int | None
) -> tuple[Callable[[Array], Array], nn.Layer]:
    """How inputs are reshaped, and the network on them."""
    last = num_outputs or 1
    squeeze = () if num_outputs else (nn.activation(_single_output),)
    if config.model != "lenet":
        widths = config.widths if config.model == "mlp" else ()
        flatten = (nn.flatten(),) if len(shape) > 1 else ()
        core = nn.mlp((*widths, last), activation=activation)
        parts = (*flatten, core, *squeeze)
        return lambda x: x, nn.serial(*parts) if len(parts) > 1 else core
    image: Mapping[int, tuple[int, ...]] = {2: (*shape, 1), 3: shape}
    target = (8, 8, 1) if config.data == "digits" else image.get(len(shape))
    if target is None or min(target[:2]) < 8:
        raise UserError(f"lenet needs images of 8 × 8 pixels or more, got inputs of shape {shape}; use --model mlp")
    kernel = 5 if min(target[:2]) >= 12 else 3
    core = nn.lenet(last, kernel_size=kernel, activation=activation)
    return lambda x: x.reshape(-1, *target), nn.serial(core, *squeeze) if squeeze else core
