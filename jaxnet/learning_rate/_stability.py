"""The largest stable rate of an optax optimizer in the state that it is in, by linearising its update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, UserError
from jaxnet.curvature import LinearOperator, eigsh, hessian


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stability:
    """Where an optimizer's rate stands between 0 and its limit.

    Attributes:
      rate: η, the rate at this state.
      limit: the largest stable rate.
      vector: a unit vector like params, R^-½ times the direction that oscillates first; a warm start for the next call.
      num_matvecs: Hessian products spent.
    """

    rate: Array
    limit: Array
    vector: ArrayTree
    num_matvecs: Array

    @property
    def ratio(self) -> Array:
        """η over its limit: 1 is the edge of stability."""
        return self.rate / self.limit


def stability(
    loss: Loss,
    params: ArrayTree,
    batch: Any,
    optimizer: optax.GradientTransformation,
    opt_state: Any,
    *,
    key: Array,
    tol: float = 1e-3,
    v0: ArrayTree | None = None,
) -> Stability:
    """The rate of an optimizer and its limit, read from what its update does, whatever it was made of.

    With its second moments held, ν̂ and its count t as the state has them, the update is linear in gradient, momentum
    and params, element by element. At the limit the distance x from the fixed point alternates, x → −x; so does the
    momentum, and the update is −(R H + D) x with two diagonals that the optimizer itself is asked for: R is η for
    gradient descent, η/(1 + β) for the heavy ball, η (1 − β₁)/(1 + β₁) P⁻¹ for Adam, and D the decay of weights. Since
    x → −x takes an update of −2x, the rate can grow by the factor 2/λ_max(R^½ H R^½ + D).
    A root can leave the unit circle nowhere else as the rate grows (but at 1, where the loss curves downwards, at any
    rate): with one momentum, Nesterov's included, 1/G(z) of the transfer G from gradient to −x has an imaginary part of
    one sign on the circle's upper half, while −H is real.

    The rate scales the whole update, decay included, as in optax's own optimizers. It is taken from the state where
    `optax.inject_hyperparams` names it, and is else what the response leaves when momentum and moments are divided out.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point.
      batch: the examples, or a data set in batches.
      optimizer: `optax.sgd`, with momentum or Nesterov's, `adam`, `adamw`, `nadam`, `amsgrad`, `adagrad`, `rmsprop`, or
        a chain of their parts with `ema`, scales, schedules and decay of weights, masked or not; wrapped in
        `inject_hyperparams` or not.
      opt_state: its state; a schedule counts as it stands there.
      key: a `jax.random.key` for the start vector.
      tol: relative accuracy of the limit.
      v0: a start vector, such as ``vector`` of a state nearby.

    Returns:
      A `Stability`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract or each other, or are in half precision; a part of
        the optimizer is none of those known; no gradient has reached the second moments yet; the update is not linear
        in the gradient (clipping in force, a sign, a norm); a value is not finite; or nothing curves upwards, so that
        no rate follows.

    Reference:
      Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability", 2021, appendix B;
      "Adaptive Gradient Methods at the Edge of Stability", 2022, eq. 5.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer: expected one that is made, such as optax.sgd(0.1), got {type(optimizer).__name__}")
    batch = dataset.of(batch)
    contract.check(loss, params, dataset.first(batch))
    params = jax.tree.map(jnp.asarray, params)
    wanted: list[Any] = [jax.tree.structure(x) for x in (jax.eval_shape(optimizer.init, params), opt_state)]
    if wanted[0] != wanted[1]:
        raise ValueError("opt_state: expected the state of this optimizer, got one of another structure")
    _check_known(opt_state)
    _check_precision(params, opt_state)
    value, grad = _value_and_grad(loss, params, batch)
    if not jnp.isfinite(value) or contract.not_finite(params=params, grad=grad):
        where = contract.not_finite(params=params, batch=dataset.first(batch), loss=value, gradient=grad)
        raise UserError(f"not finite: {', '.join(where)}")
    found = _respond(optimizer, opt_state, params, value, grad)
    _check_response(found)
    op = hessian(loss, params, batch)
    op = LinearOperator(_alternating, op.space, (op, found.root, found.decay))
    pairs = eigsh(op, tol=tol, key=key, v0=v0)
    top = float(pairs.values[0])
    if not top > 0:
        raise ValueError(
            f"loss: along the update its largest curvature is {top:.3g}, not positive, so no rate follows from it; "
            "is the loss flat, concave or not finite at these params?"
        )
    if not pairs.converged:
        raise ValueError(
            f"tol: not reached in {int(pairs.num_matvecs)} products; allow more than {tol}, or use float64"
        )
    limit = found.rate * 2 / pairs.values[0]
    return Stability(found.rate, limit, jax.tree.map(lambda x: x[0], pairs.vectors), pairs.num_matvecs)


def _alternating(operands: Any, v: ArrayTree) -> ArrayTree:
    """R^½ H R^½ + D."""
    op, root, decay = operands
    curved = op @ jax.tree.map(jnp.multiply, root, v)
    return jax.tree.map(lambda r, h, d, x: r * h + d * x, root, curved, decay, v)


class _Fields(NamedTuple):
    """What the fields of an optax state are: momentum moves with the params, averages hardly move in a step.

    ``sums`` are those momenta that add gradients up instead of averaging.
    """

    momentum: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    squares: tuple[str, ...] = ()
    means: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()


# By name, since not all of them are public.
_STATES = {
    "EmptyState": _Fields(),
    "ScaleByScheduleState": _Fields(),
    "WeightDecaySchedule": _Fields(),
    "TraceState": _Fields(momentum=("trace",), sums=("trace",)),
    "EmaState": _Fields(momentum=("ema",), counts=("count",)),
    "ScaleByAdamState": _Fields(momentum=("mu",), squares=("nu",), counts=("count",)),
    "ScaleByAmsgradState": _Fields(momentum=("mu",), squares=("nu", "nu_max"), counts=("count",)),
    "ScaleByRssState": _Fields(squares=("sum_of_squares",)),
    "ScaleByRmsState": _Fields(squares=("nu",)),
    "ScaleByRmsWithCountState": _Fields(squares=("nu",), counts=("count",)),
    "ScaleByRStdDevState": _Fields(squares=("nu",), means=("mu",)),
    "ScaleByRStdDevWithCountState": _Fields(squares=("nu",), means=("mu",), counts=("count",)),
}
_WRAPPERS = {
    "InjectStatefulHyperparamsState": "inner_state",
    "InjectHyperparamsState": "inner_state",
    "MaskedState": "inner_state",
    "PartitionState": "inner_states",
}


def _map(role: str, f: Callable[..., Any], state: Any, *rest: Any) -> Any:
    """``state`` with f applied to its fields of one role, and to those of states like it."""
    name = type(state).__name__
    if isinstance(state, dict):
        return {k: _map(role, f, x, *(other[k] for other in rest)) for k, x in state.items()}
    if name in _WRAPPERS:
        names, apply = (_WRAPPERS[name],), lambda *inner: _map(role, f, *inner)
    elif name in _STATES:
        names, apply = getattr(_STATES[name], role), f
    elif type(state) in (tuple, list):
        return type(state)(_map(role, f, *parts) for parts in zip(state, *rest, strict=True))
    else:
        raise ValueError(
            f"optimizer: an update with {type(state).__name__} is not known to be linear (those of momentum, of second "
            "moments like Adam's, of decay and schedules are); find where it fails by learning_rate.range_test"
        )
    return state._replace(**{n: apply(*(getattr(s, n) for s in (state, *rest))) for n in names})


def _collect(role: str, state: Any) -> list[Any]:
    found: list[Any] = []
    _map(role, found.append, state)
    return found


def _check_known(opt_state: Any) -> None:
    momenta = len(_collect("momentum", opt_state))
    if momenta > 1:
        raise ValueError(f"optimizer: expected at most one momentum, got {momenta}; two have no limit in closed form")
    squares = _collect("squares", opt_state)
    if squares and not any(jnp.any(x != 0) for x in jax.tree.leaves(squares)):
        raise ValueError(
            "opt_state: its second moments have seen no gradient, so the update has no scale (ν̂ = 0/0) and no limit; "
            "train for some steps first"
        )


def _check_precision(params: ArrayTree, opt_state: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": params, "opt_state": opt_state}):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).eps > jnp.finfo(jnp.float32).eps:
            name = f"{path[0].key}{jax.tree_util.keystr(path[1:])}"
            raise TypeError(f"{name}: a limit needs float32 or float64, got {dtype}, in which momentum is rounded off")


class _Response(NamedTuple):
    """√R and D; of R the least and the largest, and whether both are finite; η, and by how much it differs between
    elements; the share of the next update that is not linear.
    """

    root: ArrayTree
    decay: ArrayTree
    least: Array
    largest: Array
    finite: Array
    rate: Array
    spread: Array
    nonlinear: Array


Update = Callable[[Any, Any, Any], tuple[Any, Any]]
Linear = Callable[[Any, Any, Any], tuple[Any, Any]]


@functools.partial(dataset.jit, static_argnames="loss")
def _value_and_grad(loss: Loss, params: ArrayTree, data: Any) -> tuple[Array, ArrayTree]:
    """Compiled apart from what differs with the optimizer."""
    return dataset.mean(contract.ValueAndGrad(loss), data, params)


@jax.jit(static_argnames="optimizer")
def _respond(
    optimizer: optax.GradientTransformation, opt_state: Any, params: ArrayTree, value: Array, grad: ArrayTree
) -> _Response:
    extended = optax.with_extra_args_support(optimizer)

    def update(g: ArrayTree, state: Any, p: ArrayTree) -> tuple[ArrayTree, Any]:
        return extended.update(g, state, p, value=value, grad=grad)

    _, after = update(grad, opt_state, params)
    rate, spread = _rate(update, opt_state, params)
    injected = [x for _, x in optax.tree.get_all_with_path(after, "learning_rate", lambda _, x: hasattr(x, "dtype"))]
    if len(injected) == 1:
        rate, spread = injected[0].astype(rate.dtype), jnp.zeros_like(spread)
    linear = _linearise(update, _frozen(update, _map("counts", lambda t: t - 1, opt_state), opt_state, params), params)
    response, decay = optax.tree.scale(-1, (_driven(linear, -1, 1, 0), _driven(linear, -1, 0, 1)))
    return _Response(
        root=jax.tree.map(jnp.sqrt, response),
        decay=decay,
        least=optax.tree.min(response),
        largest=optax.tree.max(response),
        finite=jnp.isfinite(optax.tree.sum((response, decay))),
        rate=rate,
        spread=spread,
        nonlinear=_nonlinear(update, opt_state, params, grad),
    )


def _filled(value: float, tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def _frozen(update: Update, state: Any, wanted: Any, params: ArrayTree) -> Any:
    """``state`` with those averages that an update by no gradient takes to the averages of ``wanted``."""
    # Of a parameter that never had a gradient the root's derivative would be infinite.
    floor = lambda x: jnp.where(x == 0, jnp.finfo(x.dtype).tiny / jnp.finfo(x.dtype).eps, x)
    for role in ("squares", "means"):
        state = _map(role, lambda _, x: jax.tree.map(floor, x), state, wanted)
    _, later = update(_filled(0, params), state, params)
    for role in ("squares", "means"):
        state = _map(role, lambda x, y: jax.tree.map(lambda x, y: x * (x / y), x, y), state, later)
    return state


def _linearise(update: Update, frozen: Any, params: ArrayTree) -> Linear:
    """(δg, δm, δω) → (δu, δm′) about no gradient and no momentum, where averages of squares stand still.

    A number stands for a pytree filled with it.
    """

    def step(g: ArrayTree, momentum: list[ArrayTree], p: ArrayTree) -> tuple[ArrayTree, list[ArrayTree]]:
        given = iter(momentum)
        u, after = update(g, _map("momentum", lambda _: next(given), frozen), p)
        return u, _collect("momentum", after)

    origin = (_filled(0, params), _filled(0, _collect("momentum", frozen)), params)
    tangent = jax.linearize(step, *origin)[1]
    tree = lambda x, like: _filled(x, like) if isinstance(x, int) else x
    return lambda *given: tangent(*map(tree, given, origin))


def _driven(linear: Linear, z: int, gradient: int, weights: int) -> ArrayTree:
    """The update in answer to gradients, or params, that have been multiplied by z at each step for ever."""
    _, fed = linear(gradient, 0, weights)
    _, kept = linear(0, 1, 0)
    return linear(gradient, jax.tree.map(lambda c, e: c / (z - e), fed, kept), weights)[0]


def _rate(update: Update, opt_state: Any, params: ArrayTree) -> tuple[Array, Array]:
    """η: what a steady gradient of 1 moves the params by, second moments being 1 and a sum of momentum an average.

    ε plays no part beside moments that are large, nor the correction of averages after many steps.
    """

    def at(square: float, count: int) -> ArrayTree:
        wanted = _map("squares", lambda x: _filled(square, x), opt_state)
        wanted = _map("means", lambda x: _filled(0, x), wanted)
        far = _map("counts", lambda t: jnp.full_like(t, count), opt_state)
        linear = _linearise(update, _frozen(update, far, wanted, params), params)
        steady = optax.tree.scale(-(square**0.5) if _collect("squares", opt_state) else -1, _driven(linear, 1, 1, 0))
        if not _collect("sums", opt_state):
            return steady
        average = lambda e, r: r if isinstance(e, optax.MaskedNode) else r * (1 - e)
        return jax.tree.map(average, linear(0, 1, 0)[1][0], steady, is_leaf=lambda x: isinstance(x, optax.MaskedNode))

    # Twice, so that what is no root of a second moment, or not corrected yet, shows.
    rates, others = at(2.0**48, 2**30), at(2.0**44, 2**29)
    rate = jnp.stack([x.max() for x in jax.tree.leaves(rates)]).max()
    differ = lambda x: jnp.where(x == 0, 0, jnp.abs(x - rate)).max()
    return rate, jnp.stack([differ(x) for x in jax.tree.leaves((rates, others))]).max()


def _nonlinear(update: Update, opt_state: Any, params: ArrayTree, grad: ArrayTree) -> Array:
    """How far the next update is from linear, element by element, in all but its second moments; relative."""
    updates, after = update(grad, opt_state, params)
    # The linear part is taken about no gradient and no momentum, with the second moments that the step leads to. What a
    # linear update with those moments would do is then known before it is compared with what the optimizer does do: a
    # clip in force, or a sign, is linear about 0 and differs from that here.
    linear = _linearise(update, _frozen(update, opt_state, after, params), params)
    expected, _ = linear(grad, _collect("momentum", opt_state), params)
    # A linear map need not be a diagonal one, which the limit assumes: the answer to a gradient of ones, times the
    # gradient, has to be the answer to the gradient. A norm's derivative, which mixes the elements, fails here.
    by_element = jax.tree.map(jnp.multiply, linear(1, 0, 0)[0], grad)
    pairs = ((updates, expected), (linear(grad, 0, 0)[0], by_element))
    apart = [optax.tree.norm(optax.tree.sub(a, b)) for a, b in pairs]
    size = optax.tree.norm(updates)
    return jnp.stack(apart).max() / jnp.where(size == 0, 1, size)


def _check_response(found: _Response) -> None:
    tolerance = float(jnp.finfo(found.rate.dtype).eps) ** 0.5
    if not found.nonlinear <= tolerance:
        raise ValueError(
            "optimizer: its update is not linear in the gradient here (is clipping in force, does it take a sign, or "
            "divide by a norm?), so it has no limit of this kind; find where it fails by learning_rate.range_test"
        )
    if found.least == found.largest == 0:
        raise ValueError(
            "optimizer: its rate is 0 in this state (a schedule's start or end?), and no multiple of it is a limit"
        )
    if not found.finite:
        raise ValueError("opt_state: its averages are not corrected yet (a count of 0); train for some steps first")
    if found.least < 0:
        raise ValueError("optimizer: its update goes up the gradient; is the sign of the rate right?")
    if not found.spread <= 1e-3 * found.rate:
        raise ValueError(
            "optimizer: its rate cannot be told from its update (parts with several rates, or moments unlike Adam's); "
            "wrap its maker, optax.inject_hyperparams(maker)(learning_rate=...), so that the state names it"
        )
