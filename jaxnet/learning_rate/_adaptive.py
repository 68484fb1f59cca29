"""The learning rate from λ_max while training runs, as an optax transformation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree
from jaxnet.curvature import LEADING, LinearOperator, Space, by_derivatives, follow
from jaxnet.training import ValueFn, is_masked

# A rate needs λ_max to so much, no more.
_TOLERANCE = 0.05
# A gradient that has grown by this factor since the last check calls for another at once.
_JUMP = 2.0


@contract.result
class ScaleBySharpnessState(NamedTuple):
    """The state of `scale_by_sharpness`.

    Attributes:
      rate: the factor of the last updates, fraction/λ_max.
      fraction: the one that it was made with.
      sharpness: λ_max at the last check; NaN before the first.
      leading: the three leading vectors, leaves (3, ...), from which the next check starts; 0 at first.
      num_matvecs: Hessian products spent in all.
      num_checks: checks in all.
      since: updates since the last check, and
      norm: the norm of the incoming updates at it.
    """

    rate: Array
    fraction: Array
    sharpness: Array
    leading: ArrayTree
    num_matvecs: Array
    num_checks: Array
    since: Array
    norm: Array

    @property
    def whole_batch(self) -> bool:
        """That it needs all examples in each step: `jaxnet.training.fit` reads this, and refuses mini-batches."""
        return True


@dataclasses.dataclass(frozen=True)
class _Product:
    """Hv = ∂/∂ε g(ω + εv) of a loss that is known by its value only."""

    value_fn: Callable[[ArrayTree], Array]

    def __call__(self, params: ArrayTree, v: ArrayTree) -> ArrayTree:
        return by_derivatives(jax.grad(self.value_fn), params, v)


def scale_by_sharpness(
    *, key: Array, fraction: Array | float, every: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by η = fraction/λ_max, sign kept, with λ_max of the loss's Hessian where training is.

    λ_max is found at the first update, at every ``every``-th after a check, and at once when the incoming updates are
    twice as long as at the last check; each time from the last leading vectors, which takes about 4 products. Between
    checks η stays. Where rounding hides λ_max, as in a loss that is all but 0, what it may hide is added to |λ_max|.
    Where nothing curves upwards it stays too, and before any curvature is seen it is
    fraction/|λ_max|, or 0 where that is 0 or not finite.

    It works in any loop that passes ``value_fn`` to ``update``, as optax's line searches want it, under `jax.jit` and
    in `lax.scan`: the loss as a function of the params, on the data whose curvature should decide. That is to be all of
    the data: a mini-batch's λ_max is larger, and its noise is not seen at all, so that runs on mini-batches fail at
    rates that look derived. `jaxnet.training.fit` refuses them; `analyse` derives a rate for them.

    Under `optax.masked` or `optax.partition` λ_max is that of the block of the params that it steps, the others held:
    what is stepped alone is stable below a fraction of 2. Where k groups each follow a block of their own, the whole is
    certain to be so below 2/k only, since λ_max(P^-½HP^-½) is up to k for P of the blocks' λ_max. In a loop of one's
    own ``value_fn`` is then to be a `jaxnet.training.ValueFn`, which fills in what is masked; `fit` makes it one.

    Args:
      key: a `jax.random.key` for the start vectors.
      fraction: of 1/λ_max; gradient descent is stable below 2, momentum β below 2 + 2β.
      every: updates a check.

    Returns:
      An optax transformation with a `ScaleBySharpnessState`.

    Raises:
      ValueError: a number is out of range; or, at an update, there are no ``params`` or no ``value_fn``, or some params
        are masked and ``value_fn`` knows no others.

    Reference:
      LeCun, Simard & Pearlmutter, "Automatic Learning Rate Maximization by On-Line Estimation of the Hessian's
      Eigenvectors", NIPS 1992.
    """
    if isinstance(fraction, (int, float)) and not 0 < fraction < float("inf"):
        raise ValueError(f"fraction: expected positive and finite, got {fraction}")
    contract.check_count("every", every)

    def init(params: ArrayTree) -> ScaleBySharpnessState:
        contract.check_params(params)
        zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
        rows = min(LEADING, Space.of(params).size)
        leading = jax.tree.map(lambda x: jnp.zeros((rows, *jnp.shape(x)), jnp.result_type(x)), params)
        made_with = jnp.asarray(fraction, zero.dtype)
        return ScaleBySharpnessState(zero, made_with, jnp.full((), jnp.nan), leading, none, none, none, zero)

    def update(
        updates: ArrayTree, state: ScaleBySharpnessState, params: ArrayTree | None = None, *,
        value_fn: Callable[[ArrayTree], Array] | None = None, **others: Any,
    ) -> tuple[ArrayTree, ScaleBySharpnessState]:  # fmt: skip
        del others
        if params is None or value_fn is None:
            raise ValueError(
                "value_fn: expected the loss as a function of params, whose curvature decides, and params: "
                "optimizer.update(grads, state, params, value_fn=lambda params: loss(params, batch))"
            )
        if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))) and not isinstance(value_fn, ValueFn):
            raise ValueError(
                "value_fn: some params are masked, and the loss needs them all: pass "
                "value_fn=jaxnet.training.ValueFn(value_fn, params), which fills them in"
            )
        # A state made with another fraction takes this one at once, not at the next check.
        own = jnp.asarray(fraction, state.fraction.dtype)
        state = state._replace(rate=state.rate * (own / state.fraction), fraction=own)
        op = LinearOperator(_Product(value_fn), Space.of(params), params)
        norm = optax.tree.norm(updates).astype(state.norm.dtype)

        def check(state: ScaleBySharpnessState) -> ScaleBySharpnessState:
            found = follow(op, state.leading, _TOLERANCE, key=jax.random.fold_in(key, state.num_checks))
            value = found.value.astype(state.sharpness.dtype)
            known = jnp.isfinite(value) & (value != 0)
            # Where rounding hides λ_max, as in a loss that is rounding too, it may be larger by as much as is hidden.
            error = jnp.maximum(found.residual_norm, found.product_error)
            hidden = jnp.where(found.converged, 0, error).astype(value.dtype)
            wanted = own / (jnp.abs(jnp.where(known, value, 1)) + jnp.where(known, hidden, 0))
            return state._replace(
                rate=jnp.where(known & ((state.rate == 0) | (value > 0)), wanted, state.rate),
                sharpness=value,
                leading=jax.tree.map(lambda x: jnp.where(known, x, 0), found.vectors),
                num_matvecs=state.num_matvecs + found.num_matvecs,
                num_checks=state.num_checks + 1,
                since=jnp.zeros_like(state.since),
                norm=norm,
            )

        due = (state.num_checks == 0) | (state.since >= every) | (norm > _JUMP * state.norm)
        state = lax.cond(due, check, lambda state: state, state)
        scaled = jax.tree.map(lambda u: (state.rate * u).astype(u.dtype), updates)
        return scaled, state._replace(since=state.since + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def sharpness_sgd(
    *, key: Array, fraction: Array | float = 1.9, every: int = 10, momentum: float = 0.9, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with momentum, on the full batch, whose rate is fraction/λ_max all along: nothing to tune.

    Args:
      key: a `jax.random.key`, as for `scale_by_sharpness`.
      fraction: of 1/λ_max, below 2 + 2β, or (2 + 2β)/(1 + 2β) for Nesterov, where it would lose stability. The default
        is half of that, as 1/λ_max is for gradient descent.
      every: updates a check.
      momentum: β in [0, 1).
      nesterov: whether the momentum is Nesterov's.

    Returns:
      An optax optimizer, whose ``update`` needs ``value_fn``; the first part of its state is the
      `ScaleBySharpnessState`.

    Raises:
      ValueError: a number is out of range.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    limit = (2 + 2 * momentum) / (1 + 2 * momentum if nesterov else 1)
    if isinstance(fraction, (int, float)) and not 0 < fraction < limit:
        raise ValueError(f"fraction: expected between 0 and {limit:.3g}, the limit of stability, got {fraction}")
    return optax.chain(
        scale_by_sharpness(key=key, fraction=fraction, every=every),
        optax.trace(momentum, nesterov) if momentum else optax.identity(),
        optax.scale(-1.0),
    )
