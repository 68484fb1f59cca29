"""The one contract of the library, ``loss(params, batch) -> scalar``, and the types that its rooms share.

The value is the mean over the batch's N examples of losses that do not see one another. Everything that
takes a loss checks its arguments here, at trace time, so that a second call with new values costs nothing.

A loss is a function of its two arguments alone. What else it reads, a global or an attribute of an object, is read when
it is compiled and kept: a later change of that is not seen. What changes belongs into the params or the batch.
"""

import dataclasses
import functools
import html
import numbers
import textwrap
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

Array: TypeAlias = jax.Array
"""An array of JAX."""
ArrayTree: TypeAlias = chex.ArrayTree
"""A pytree of arrays: params, gradients, vectors like them, batches."""
Loss: TypeAlias = Callable[[Any, Any], Array]
"""``loss(params, batch) -> scalar``, a mean over the batch's examples."""
MakeOptimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]
"""A function of the learning rate, such as `optax.sgd`."""


Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result", bound=type)
# Numbers that an array may have to be shown by value.
_FEW = 8


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


@dataclasses.dataclass(frozen=True)
class _Once:
    """A function of arrays that JAX traces once for arguments of one kind, however many programs call it."""

    call: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _once(self.call, *args, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def _once(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def traced_once(loss: Function) -> Function:
    """The same loss, traced once for arguments of one kind: to trace a large network takes longer than to run it."""
    return cast(Function, _within(loss, lambda call: call if isinstance(call, _Once) else _Once(hashable(call))))


def as_written(loss: Function) -> Function:
    """What `traced_once` was given."""
    return cast(Function, _within(loss, lambda call: call.call if isinstance(call, _Once) else call))


def _within(loss: Any, change: Callable[[Any], Any]) -> Any:
    """A loss with another function in it; a frozen dataclass keeps its kind, and names the field in its ``_WITHIN``."""
    field = getattr(type(loss), "_WITHIN", None)
    if field is None:
        return change(loss)
    return dataclasses.replace(loss, **{field: _within(getattr(loss, field), change)})


def takes_loss(function: Function) -> Function:
    """Of a function of a loss and more: one that traces the loss once, and takes one which cannot be hashed, too."""

    @functools.wraps(function)
    def call(loss: Loss, *args: Any, **kwargs: Any) -> Any:
        check_function("loss", loss)
        return function(traced_once(loss), *args, **kwargs)

    return cast(Function, call)


def result(cls: Result) -> Result:
    """Of a dataclass or NamedTuple that people see: a repr of a few lines, and a table in a notebook.

    Small arrays are shown by their values, others by dtype and shape, pytrees by how much they hold.
    """
    cls.__repr__ = _in_words  # type: ignore[method-assign, assignment]
    cls._repr_html_ = _as_table  # type: ignore[attr-defined]
    return cls


def _fields(shown: Any) -> dict[str, Any]:
    names = getattr(shown, "_fields", None) or [field.name for field in dataclasses.fields(shown)]
    return {name: getattr(shown, name) for name in names}


def _in_words(shown: Any) -> str:
    fields = ", ".join(f"{name}={brief(value)}" for name, value in _fields(shown).items())
    return textwrap.fill(f"{type(shown).__name__}({fields})", 100, subsequent_indent="    ", break_long_words=False)


def _as_table(shown: Any) -> str:
    # What has rows of its own says more than its fields do.
    rows = shown.rows() if hasattr(shown, "rows") and hasattr(shown, "to_dict") else _fields(shown).items()
    cells = ("".join(f"<td>{html.escape(x if isinstance(x, str) else brief(x))}</td>" for x in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def brief(value: Any) -> str:
    """A value in a few words: a small array by its numbers, a large one by its shape, a pytree by how much it holds."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if not _at_hand(value) or value.size > _FEW or jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return f"{value.dtype}{list(value.shape)}"
        numbers_in = np.asarray(value)
        shown = " ".join(np.array2string(numbers_in, precision=6, separator=", ").split())
        return shown.replace("[ ", "[") if value.ndim else brief(numbers_in.item())
    if value is None or isinstance(value, (str, bool, int)):
        return repr(value)
    if "__repr__" in vars(type(value)) and type(value).__repr__ is _in_words:
        return f"<{type(value).__name__}>"
    leaves = [leaf for leaf in jax.tree.leaves(value) if hasattr(leaf, "size")]
    if leaves:
        return f"<{len(leaves)} arrays, {sum(leaf.size for leaf in leaves):,} numbers>"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return textwrap.shorten(repr(value), 60, placeholder="…")


def _at_hand(value: Any) -> bool:
    """Whether an array's numbers are known here, and it is no tracer, no bare shape, no part of another process."""
    if isinstance(value, jax.Array):
        known = not isinstance(value, jax.core.Tracer)
        return known and (value.is_fully_addressable or value.is_fully_replicated)
    return isinstance(value, (np.ndarray, np.generic))


class Progress(Protocol):
    """What an observer is shown after each epoch of `jaxnet.training.fit`, among other things."""

    @property
    def epoch(self) -> int:
        """Epochs done, counted from the first of the run."""

    @property
    def state(self) -> Any:
        """The `jaxnet.training.TrainState`."""


class Observer(Protocol):
    """Called after each epoch, outside the compiled program.

    One that is a context manager too is entered before the first epoch, and left with the run, however that ends.
    """

    def __call__(self, progress: Any, /) -> None:
        """Look at a `Progress`."""


def leaf_names(tree: ArrayTree, root: str = "params") -> list[str]:
    """The leaves' names as a person writes them, ``0/kernel``; a tree that is one array has the root's.

    The box around a leaf (a Flax variable), of which it is the ``value``, has no name of its own. Where two would be
    alike (the key ``a/b`` beside ``b`` within ``a``), all are written as Python indexes them.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    boxed = jax.tree_util.GetAttrKey("value")
    unboxed = [path[:-1] if path[-1:] == (boxed,) else path for path in paths]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in unboxed]
    if len(set(names)) < len(names):
        names = [jax.tree_util.keystr(path) for path in paths]
    return [name or root for name in names]


def layer_of(name: str) -> str:
    """The layer that a leaf of this name belongs to: the path of those that lie together, ``params`` at the top."""
    return name.rpartition("/")[0] or "params"


def called(argument: str, tree: ArrayTree) -> list[tuple[str, Any]]:
    """The leaves of an argument, and what a message calls each: ``params, leaf 0/kernel``."""
    names = leaf_names(tree, argument)
    called = [name if name == argument else f"{argument}, leaf {name}" for name in names]
    return list(zip(called, jax.tree.leaves(tree), strict=True))


def num_examples(batch: ArrayTree) -> int:
    """The length N of the leading axis that all leaves of ``batch`` share.

    Raises:
      ValueError: the batch has no leaf, a leaf is a scalar, the lengths differ, or N is 0.
    """
    leaves = called("batch", batch)
    if not leaves:
        raise ValueError("batch: expected a pytree of arrays with a leading axis of examples, got no array")
    lengths = {}
    for name, leaf in leaves:
        if jnp.ndim(leaf) == 0:
            raise ValueError(f"{name}: expected a leading axis of examples, got a scalar")
        lengths[name] = jnp.shape(leaf)[0]
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name.removeprefix('batch, ')} has {n}" for name, n in lengths.items())
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
    leaves = called("params", params)
    if not leaves:
        raise ValueError("params: expected a pytree of floating arrays, got one without any leaf")
    for name, leaf in leaves:
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            raise TypeError(f"{name}: expected a floating array, got {type(leaf).__name__}") from None
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating array, got {dtype}; keep what is not trained out of params")
    if all(jnp.size(leaf) == 0 for _, leaf in leaves):
        raise ValueError("params: expected at least one number, got arrays of size 0 alone")


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
    for leaf, x, y in zip(leaf_names(like), *map(jax.tree.leaves, (tree, like)), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            got = f"leaf {leaf} of shape {jnp.shape(x)} and not {jnp.shape(y)}"
            raise ValueError(f"{name}: expected a pytree like params, got {got}")


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
    leaves = [leaf for argument, tree in trees.items() for leaf in called(argument, tree)]
    inexact = [(name, leaf) for name, leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    finite = jax.device_get(_finite([leaf for _, leaf in inexact]))
    return [name for (name, _), holds in zip(inexact, finite, strict=True) if not holds]


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


def check_count(name: str, value: Any, lowest: int = 1) -> None:
    """Raise unless it says how many there are.

    Raises:
      TypeError: it is no whole number.
      ValueError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < lowest:
        raise ValueError(f"{name}: expected {lowest} or more, got {value}")


def check_function(name: str, value: Any) -> None:
    """Raise unless it can be called.

    Raises:
      TypeError: it cannot.
    """
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}")


def check_tolerance(tol: Array | float) -> None:
    """Raise unless a tolerance that is known as a number is positive.

    Raises:
      TypeError: it is a string.
      ValueError: it is not positive.
    """
    if isinstance(tol, str):
        raise TypeError(f"tol: expected a number, got {tol!r}")
    if isinstance(tol, (int, float)) and not tol > 0:
        raise ValueError(f"tol: expected a positive number, got {tol}")
