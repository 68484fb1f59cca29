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
import optax

Array: TypeAlias = jax.Array
ArrayTree: TypeAlias = chex.ArrayTree
Loss: TypeAlias = Callable[[Any, Any], Array]
MakeOptimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]
"""A function of the learning rate, such as `optax.sgd`."""


Function = TypeVar("Function", bound=Callable[..., Any])


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
      ValueError: there is no leaf, or all are empty.
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
    if all(jnp.size(leaf) == 0 for _, leaf in leaves):
        raise ValueError("params: expected at least one number, got arrays of size 0 alone")


def leaf_names(structure: Any) -> list[str]:
    """The names of a structure's leaves as a person writes them, ``0/kernel``."""
    tree = jax.tree.unflatten(structure, range(structure.num_leaves))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def widened(tree: ArrayTree) -> ArrayTree:
    """The same numbers, those in half precision or less as float32."""

    def wide(x: Any) -> Any:
        dtype = jnp.result_type(x)
        narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        return jnp.asarray(x, jnp.float32) if narrow else x

    return jax.tree.map(wide, tree)


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
