"""The one contract of the library, ``loss(params, batch) -> scalar``, and the types that its rooms share.

The value is the mean over the batch's N examples of losses that do not see one another. Everything that
takes a loss checks its arguments here, at trace time, so that a second call with new values costs nothing.

A loss is a function of its two arguments alone. What else it reads, a global or an attribute of an object, is read when
it is compiled and kept: a later change of that is not seen. What changes belongs into the params or the batch.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

Array: TypeAlias = jax.Array
ArrayTree: TypeAlias = chex.ArrayTree
Loss: TypeAlias = Callable[[Any, Any], Array]
MakeOptimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]
"""A function of the learning rate, such as `optax.sgd`."""


Function = TypeVar("Function", bound=Callable[..., Any])

# Sets of examples on which a loss is tried, and how many there are in one.
_DRAWS, _ROWS = 4, 32


class UserError(ValueError):
    """What a person gave cannot serve: a file, an option, or data, params and rates by their values.

    The message says what was expected, what came, and the mend. The command line shows it in one line; any other error
    is a fault of the program, and shows its traceback.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class _ByIdentity:
    """A callable that cannot be hashed, such as a module that holds arrays: the same where it is the same object."""

    call: Callable[..., Any]

    @property
    def _parts(self) -> tuple[int, ...]:
        # A method is bound anew each time that it is read.
        return tuple(id(getattr(self.call, name, self.call)) for name in ("__func__", "__self__"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def hashable(call: Function) -> Function:
    """The callable itself, or one like it that can be hashed: equal ones share one compilation."""
    try:
        hash(call)
    except TypeError:
        return cast(Function, _ByIdentity(call))
    return call


def takes_loss(function: Function) -> Function:
    """Of a function of a loss and more: one that takes a loss which cannot be hashed, too."""

    @functools.wraps(function)
    def call(loss: Loss, *args: Any, **kwargs: Any) -> Any:
        return function(hashable(loss), *args, **kwargs)

    return cast(Function, call)


class Progress(Protocol):
    """What an observer is shown after each epoch of `jaxnet.training.fit`, among other things."""

    @property
    def epoch(self) -> int:
        """Epochs done in this call."""

    @property
    def state(self) -> Any:
        """The `jaxnet.training.TrainState`."""


class Observer(Protocol):
    """Called after each epoch, outside the compiled program."""

    def __call__(self, progress: Any, /) -> None:
        """Look at a `Progress`."""


def num_examples(batch: ArrayTree) -> int:
    """The length N of the leading axis that all leaves of ``batch`` share.

    Raises:
      ValueError: the batch has no leaf, a leaf is a scalar, the lengths differ, or N is 0.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError("batch: expected a pytree of arrays with a leading axis of examples, got no array")
    lengths = {}
    for path, leaf in leaves:
        name = f"batch{jax.tree_util.keystr(path)}"
        if jnp.ndim(leaf) == 0:
            raise ValueError(f"{name}: expected a leading axis of examples, got a scalar")
        lengths[name] = jnp.shape(leaf)[0]
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise ValueError(f"batch: its leaves must share one leading axis, got {listing}")
    n = next(iter(lengths.values()))
    if n == 0:
        raise ValueError("batch: expected at least one example, got an empty leading axis")
    return n


def check_params(params: ArrayTree) -> None:
    """Raise unless ``params`` is a non-empty pytree of real floating arrays (None leaves pass).

    Raises:
      TypeError: a leaf is not a real floating array.
      ValueError: there is no leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params: expected a pytree of floating arrays, got one without any leaf")
    for path, leaf in leaves:
        name = f"params{jax.tree_util.keystr(path)}"
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            raise TypeError(f"{name}: expected a floating array, got {type(leaf).__name__}") from None
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating array, got {dtype}; keep what is not trained out of params")


def check_alike(name: str, tree: ArrayTree, like: ArrayTree) -> None:
    """Raise unless ``tree`` has the structure and the shapes of ``like``, which the message calls params.

    Raises:
      ValueError: it has not.
    """
    structures: list[Any] = [jax.tree.structure(x) for x in (like, tree)]
    if structures[0] != structures[1]:
        raise ValueError(f"{name}: expected a pytree like params, {structures[0]}, got {structures[1]}")
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(y)] for y in (like, tree)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name}: expected a pytree like params, with leaves of shapes {shapes[0]}, got {shapes[1]}")


def check(loss: Loss, params: ArrayTree, batch: ArrayTree) -> int:
    """Raise unless the three fit the contract; return N.

    Raises:
      TypeError, ValueError: see `check_params` and `num_examples`; or the loss is not one real scalar.
    """
    check_params(params)
    n = num_examples(batch)
    value = jax.eval_shape(loss, params, batch)
    if not isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(f"loss: expected one scalar, got {jax.tree.structure(value)}")
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"loss: expected a real scalar, the mean over the batch, got shape {value.shape} of {value.dtype}"
        )
    return n


def check_mean(loss: Loss, params: ArrayTree, batch: ArrayTree, key: Array | None = None) -> None:
    """Raise unless E is, on a few examples, the mean of the examples' own losses, and so is its gradient.

    Several sets of examples are drawn, since those that lie together are often alike: sorted by class, say. By values,
    so that nothing is checked where one of them is a tracer.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point at which it is tried.
      batch: the examples, in memory.
      key: for the draw; by default the same rows at each call.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.
      UserError: the loss is no such mean.
    """
    n = check(loss, params, batch)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, batch))):
        return
    size = min(n, _ROWS)
    draw = np.random.default_rng(0 if key is None else np.asarray(jax.random.key_data(key)))
    rows = np.stack([draw.choice(n, size, replace=False) for _ in range(_DRAWS)])
    tolerance = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps) ** 0.5
    remedy = (
        "are its examples coupled, as by batch normalisation in training mode, or is it a sum? Use running statistics, "
        "or a normalisation within each example, and the mean over the batch"
    )
    for whole, mean, gradient, apart in np.stack(_both_ways(loss, params, batch, rows), axis=1).astype(float):
        if abs(whole - mean) > tolerance * max(abs(whole), abs(mean)):
            got = f"on {size} examples it is {whole:.4g}, but the mean of their own losses is {mean:.4g}"
            raise UserError(f"loss: {got}; {remedy}")
        if apart > 10 * tolerance * gradient:
            raise UserError(
                f"loss: its gradient on {size} examples is not the mean of their own losses' gradients; {remedy}"
            )


@jax.jit(static_argnames="loss")
def _both_ways(loss: Loss, params: ArrayTree, batch: ArrayTree, rows: Array) -> tuple[Array, Array, Array, Array]:
    """For each row of rows E, the mean of their own losses, the length of E's gradient, and how far that mean's is."""
    one = lambda p, example: loss(p, jax.tree.map(lambda x: x[None], example))
    mean_of_own = lambda p, b: jax.vmap(one, in_axes=(None, 0))(p, b).mean()
    joined = lambda tree: ravel_pytree(tree)[0].astype(jnp.promote_types(jnp.result_type(float), jnp.float32))

    def of(rows: Array) -> tuple[Array, Array, Array, Array]:
        few = jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)
        (whole, gradient), (mean, own) = (jax.value_and_grad(f)(params, few) for f in (loss, mean_of_own))
        gradient, own = joined(gradient), joined(own)
        return whole, mean, jnp.linalg.norm(gradient), jnp.linalg.norm(gradient - own)

    return jax.lax.map(of, rows)


@dataclasses.dataclass(frozen=True)
class ValueAndGrad:
    """``function(batch, params) -> (E, ∂E/∂ω)``, hashable: equal losses share one compilation."""

    loss: Loss

    def __call__(self, batch: ArrayTree, params: ArrayTree) -> tuple[Array, ArrayTree]:
        """The value and the gradient on one batch."""
        return jax.value_and_grad(self.loss)(params, batch)


def not_finite(**trees: ArrayTree) -> list[str]:
    """The names of the leaves that hold a NaN or an infinity; for values at hand, not for tracers."""
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    inexact = [(path, leaf) for path, leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    finite = jax.device_get(_finite([leaf for _, leaf in inexact]))
    bad = [path for (path, _), holds in zip(inexact, finite, strict=True) if not holds]
    return [f"{path[0].key}{jax.tree_util.keystr(path[1:])}" for path in bad]


@jax.jit
def _finite(leaves: list[Array]) -> list[Array]:
    return [jnp.isfinite(x).all() for x in leaves]


def check_batch_size(batch_size: int, n: int) -> int:
    """B, if it is a whole number in 1…N.

    Raises:
      ValueError: it is not.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or not 1 <= batch_size <= n:
        raise UserError(f"batch_size: expected 1 to {n}, the number of examples, got {batch_size}")
    return int(batch_size)


def check_tolerance(tol: Array | float) -> None:
    """Raise unless a tolerance that is known as a number is positive.

    Raises:
      ValueError: it is not.
    """
    if isinstance(tol, (int, float)) and not tol > 0:
        raise ValueError(f"tol: expected a positive number, got {tol}")
