"""Products of a Hessian and a vector, from the gradient as a function: three ways, and which of them there is."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxpr_as_fun

from jaxnet.contract import ArrayTree

Gradient: TypeAlias = Callable[[Any], Any]
HessianProduct: TypeAlias = Callable[[Gradient, Any, Any], Any]
"""``product(gradient, params, v) -> Hv``, hashable."""


def forward_over_reverse(gradient: Gradient, params: ArrayTree, v: ArrayTree) -> ArrayTree:
    """Hv = ∂/∂ε g(ω + εv), forwards: about two gradients.

    Args:
      gradient: g, a function of params.
      params: the point ω.
      v: a vector like params.

    Reference:
      Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994, eq. 2.
    """
    return jax.jvp(gradient, (params,), (v,))[1]


def reverse_over_reverse(gradient: Gradient, params: ArrayTree, v: ArrayTree) -> ArrayTree:
    """Hv = ∂/∂ω v·g(ω), by the reverse rules alone: as exact, in more memory. Arguments as `forward_over_reverse`."""
    return jax.vjp(gradient, params)[1](v)[0]


@dataclasses.dataclass(frozen=True)
class Differences:
    """Hv ≈ ‖v‖ (g(ω + hu) − g(ω − hu))/2h along u = v/‖v‖: two gradients, whose own derivative need not exist.

    The error is h²/6 times g's third derivative, and what rounding leaves of g over h. They are about equal at
    h = (eps (1 + ‖ω‖))^⅓ where g changes over lengths of 1, with eps of the least precise leaf; both are about
    eps^⅔ then, 2e-5 of ‖H‖ in single precision. `difference` tells the error that there is.

    Attributes:
      step: what to multiply that h by, such as 10 for a kernel that computes in half precision.

    Raises:
      ValueError: the step is not positive and finite.

    Reference:
      Nocedal & Wright, "Numerical Optimization", 2006, section 8.1.
    """

    step: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a step that is none."""
        if not 0 < self.step < float("inf"):
            raise ValueError(f"step: expected a positive and finite number, got {self.step}")

    def __call__(self, gradient: Gradient, params: ArrayTree, v: ArrayTree) -> ArrayTree:
        """Hv; arguments as `forward_over_reverse`."""
        eps = max(float(jnp.finfo(jnp.result_type(x)).eps) for x in jax.tree.leaves(params))
        size = optax.tree.norm(v)
        length = jnp.where(size > 0, size, 1)
        h = self.step * (eps * (1 + optax.tree.norm(params))) ** (1 / 3) / length
        moved = lambda by: gradient(jax.tree.map(lambda p, x: p + by.astype(p.dtype) * x.astype(p.dtype), params, v))
        return jax.tree.map(lambda a, b: (a - b) / (2 * h).astype(a.dtype), moved(h), moved(-h))

    @property
    def doubled(self) -> "Differences":
        """With twice the step. The two products differ by three times the error of this one that the step makes, and
        by a little more than what rounding makes."""
        return Differences(2 * self.step)


def by_derivatives(gradient: Gradient, params: ArrayTree, v: ArrayTree) -> ArrayTree:
    """Hv, forward over reverse; or reverse over reverse, of a function that has a rule for reverse alone.

    Raises:
      TypeError: the gradient cannot be differentiated, because a function's rule cannot.
    """
    for product in (forward_over_reverse, reverse_over_reverse):
        run = _traced(product, gradient, params, v)
        if run is not None:
            return run(params, v)
    raise TypeError(
        "loss: its gradient has no derivative, since a function in it (a kernel, a callback) has a reverse rule that "
        "cannot be differentiated; hessian, layer_sharpness and sharpness take product=curvature.Differences(); "
        "anything else needs a plain implementation of that function"
    )


def way_of(gradient: Gradient, params: ArrayTree, v: ArrayTree) -> HessianProduct:
    """The first of the three that there is."""
    for product in (forward_over_reverse, reverse_over_reverse):
        if _traced(product, gradient, params, v) is not None:
            return product
    return Differences()


def words_of(product: HessianProduct) -> str:
    """What a product does, in words."""
    if isinstance(product, Differences):
        return "differences of gradients"
    return str(getattr(product, "__name__", type(product).__name__)).replace("_", " ")


def _traced(
    product: HessianProduct, gradient: Gradient, params: ArrayTree, v: ArrayTree
) -> Callable[[ArrayTree, ArrayTree], ArrayTree] | None:
    """The product as it was traced; None where a derivative that it needs is missing, and the gradient is not."""
    try:
        closed, like = jax.make_jaxpr(functools.partial(product, gradient), return_shape=True)(params, v)
        if "custom_lin[" in str(closed.jaxpr):
            # A rule for reverse alone, met forwards. What is not used of one does not matter: the compiler tells.
            jax.jit(jaxpr_as_fun(closed)).lower(*closed.in_avals)
    except Exception:  # for a missing derivative each primitive raises an error of its own
        jax.eval_shape(gradient, params)
        return None
    structure = jax.tree.structure(like)
    return lambda *given: jax.tree.unflatten(structure, jaxpr_as_fun(closed)(*jax.tree.leaves(given)))


def pushforward(function: Callable[[Any], Any], params: ArrayTree, v: ArrayTree) -> tuple[Any, Any]:
    """f(ω) and its derivative Jv along v: forwards, or of a function that has a rule for reverse alone backwards twice.

    v ↦ Jv is the transpose of u ↦ J′u, and that is linear in u.

    Args:
      function: f, of params.
      params: the point ω.
      v: a vector like params.
    """
    if "custom_vjp_call" not in str(jax.make_jaxpr(function)(params).jaxpr):
        return jax.jvp(function, (params,), (v,))
    outputs, pull = jax.vjp(function, params)
    return outputs, jax.vjp(pull, jax.tree.map(jnp.zeros_like, outputs))[1]((v,))[0]
