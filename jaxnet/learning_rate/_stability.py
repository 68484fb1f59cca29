"""The largest stable rate of an optax optimizer in the state that it is in, by linearising its update."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, UserError
from jaxnet.curvature import eigsh, hessian
from jaxnet.learning_rate._response import (
    alternating,
    before,
    by_role,
    check_momenta,
    collect,
    driven,
    elements,
    frozen,
    linearise,
    nonlinearity,
    own_rate,
)


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stability:
    """Where an optimizer's rate stands between 0 and its limit.

    Attributes:
      rate: η, the rate at this state.
      limit: the largest stable rate; NaN where this state has none.
      vector: a unit vector like params, R^-½ times the direction that oscillates first; a warm start for the next call.
        Zeros where there is no limit.
      num_matvecs: Hessian products spent.
      reason: why there is no limit in this state, in words; empty where there is one.
    """

    rate: Array
    limit: Array
    vector: ArrayTree
    num_matvecs: Array
    reason: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def ratio(self) -> Array:
        """η over its limit: 1 is the edge of stability."""
        return self.rate / self.limit


@contract.takes_loss
@dataset.on_automatic_axes
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
    rate): with one momentum a parameter, Nesterov's included, 1/G(z) of the transfer G from gradient to −x has an
    imaginary part of one sign on the circle's upper half, while −H is real.

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
      A `Stability`. Along a run that is well there are states without a limit: second moments that no gradient has
      reached yet, a schedule at 0, clipping in force, a loss that curves upwards nowhere, or a ``tol`` that the
      products allowed do not reach. The limit is then NaN, and ``reason`` says why.

    Raises:
      TypeError: the arguments are in half precision; a part of the optimizer is none of those known, or a parameter has
        two momenta; or its update is not linear in the gradient however small that is (a sign, a norm). All of this
        shows at the first call.
      ValueError: the arguments do not fit the contract or each other; the update goes up the gradient; or its rate
        cannot be told.
      UserError: a value is not finite.

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
    check_momenta(opt_state, params, "optimizer")
    _check_precision(params, opt_state)
    value, grad = _value_and_grad(loss, params, batch)
    if not jnp.isfinite(value) or contract.not_finite(params=params, grad=grad):
        where = contract.not_finite(params=params, batch=dataset.first(batch), loss=value, gradient=grad)
        raise UserError(f"not finite: {', '.join(where)}")
    found = _respond(optimizer, opt_state, params, value, grad)
    _check_response(found)
    reason = _no_limit(opt_state, found)
    if reason:
        return _without(reason, found.rate, params)
    pairs = eigsh(alternating(hessian(loss, params, batch), found.root, found.decay), tol=tol, key=key, v0=v0)
    top, spent = float(pairs.values[0]), pairs.num_matvecs
    if not top > 0:
        return _without(f"along the update the largest curvature is {top:.3g}, not positive", found.rate, params, spent)
    if not pairs.converged:
        return _without(f"tol = {tol:.3g} was not reached; ask for less, or use float64", found.rate, params, spent)
    return Stability(found.rate, found.rate * 2 / pairs.values[0], jax.tree.map(lambda x: x[0], pairs.vectors), spent)


def _without(reason: str, rate: Array, params: ArrayTree, num_matvecs: Array | int = 0) -> Stability:
    zeros = optax.tree.zeros_like(params)
    return Stability(rate, jnp.full_like(rate, jnp.nan), zeros, jnp.asarray(num_matvecs), reason)


def _check_precision(params: ArrayTree, opt_state: Any) -> None:
    for name, leaf in [*contract.called("params", params), *contract.called("opt_state", opt_state)]:
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).eps > jnp.finfo(jnp.float32).eps:
            raise TypeError(f"{name}: a limit needs float32 or float64, got {dtype}, in which momentum is rounded off")


class _Response(NamedTuple):
    """√R and D; of R the least and the largest, and whether both are finite; η, and by how much it differs between
    elements; the share of the next update that is not linear, and of one by a gradient next to nothing.
    """

    root: ArrayTree
    decay: ArrayTree
    least: Array
    largest: Array
    finite: Array
    rate: Array
    spread: Array
    nonlinear: Array
    always_nonlinear: Array


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
    rate, spread = own_rate(update, opt_state, params)
    injected = [x for _, x in optax.tree.get_all_with_path(after, "learning_rate", lambda _, x: hasattr(x, "dtype"))]
    if len(injected) == 1:
        rate, spread = injected[0].astype(rate.dtype), jnp.zeros_like(spread)
    linear = linearise(update, frozen(update, before(opt_state), opt_state, params), params)
    response, decay = optax.tree.scale(-1, (driven(linear, -1, 1, 0), driven(linear, -1, 0, 1)))
    return _Response(
        root=jax.tree.map(jnp.sqrt, response),
        decay=decay,
        least=elements(response).min(),
        largest=elements(response).max(),
        finite=jnp.isfinite(optax.tree.sum((response, decay))),
        rate=rate,
        spread=spread,
        nonlinear=nonlinearity(update, opt_state, params, grad),
        always_nonlinear=nonlinearity(
            update,
            by_role("momentum", functools.partial(optax.tree.scale, _SMALL), opt_state),
            params,
            optax.tree.scale(_SMALL, grad),
        ),
    )


# No clip is in force on a gradient that is multiplied by this; a sign or a norm shows all the same.
_SMALL = 2.0**-40


def _linear(share: Array) -> bool:
    return bool(share <= float(jnp.finfo(share.dtype).eps) ** 0.5)


def _check_response(found: _Response) -> None:
    """Raise what is true of the optimizer, in whatever state."""
    if not _linear(found.always_nonlinear):
        raise TypeError(
            "optimizer: its update is not linear in the gradient (does it take a sign, or divide by a norm?), so it "
            "has no limit of this kind; find where it fails by learning_rate.range_test"
        )
    if found.least < 0:
        raise ValueError("optimizer: its update goes up the gradient; is the sign of the rate right?")
    if not found.spread <= 1e-3 * found.rate:
        raise ValueError(
            "optimizer: its rate cannot be told from its update (parts with several rates, or moments unlike Adam's); "
            "wrap its maker, optax.inject_hyperparams(maker)(learning_rate=...), so that the state names it"
        )


def _no_limit(opt_state: Any, found: _Response) -> str:
    """Why there is no limit in this state, which may pass; or nothing."""
    squares = collect("squares", opt_state)
    if squares and not any(jnp.any(x != 0) for x in jax.tree.leaves(squares)):
        return "the second moments have seen no gradient yet"
    if not found.finite:
        return "the averages are not corrected yet (a count of 0)"
    if not _linear(found.nonlinear):
        return "the update is not linear in the gradient here (is clipping in force?)"
    if found.least == found.largest == 0:
        return "the rate is 0 in this state (a schedule's start or end)"
    return ""
