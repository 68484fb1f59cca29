"""λ_max estimated while training runs, from gradients alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature import _lanczos
from jaxnet.curvature._space import Space


@contract.result
class OnlineSharpness(NamedTuple):
    """Pure functions: ``init(params, *, key) -> Ψ`` and ``update(Ψ, params, batch) -> (Ψ, λ)``."""

    init: Callable[..., ArrayTree]
    update: Callable[[ArrayTree, ArrayTree, ArrayTree], tuple[ArrayTree, Array]]


@contract.takes_loss
def online_sharpness(loss: Loss, *, gamma: float = 0.03, alpha: float = 0.01) -> OnlineSharpness:
    """Ψ ← (1 − γ)Ψ + (γ/α)(∇E_p(ω + αΨ/‖Ψ‖) − ∇E_p(ω)), a running mean over batches p; λ_max ≈ ‖Ψ‖.

    A power iteration on HΨ/‖Ψ‖ by finite differences, two gradients an update and no Hessian product. The mean turns
    Ψ to the largest algebraic eigenvalue, where γ is below 2/(1 + |λ_min|/λ_max); the smaller γ, the less noise of the
    batches is left, and the more updates it takes.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      gamma: γ in (0, 1], the weight of a new batch.
      alpha: α, the length of the step by which the gradient's change is measured.

    Raises:
      ValueError: a constant is out of range.

    Reference:
      LeCun, Simard & Pearlmutter, "Automatic Learning Rate Maximization by On-Line Estimation of the Hessian's
      Eigenvectors", NIPS 1992, eq. 6.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma: expected a number in (0, 1], got {gamma}")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha: expected positive and finite, got {alpha}")

    def init(params: ArrayTree, *, key: Array) -> ArrayTree:
        start = Space.of(params).random(key)
        return jax.tree.map(lambda x: x / _lanczos.norm(start).astype(x.dtype), start)

    def update(psi: ArrayTree, params: ArrayTree, batch: ArrayTree) -> tuple[ArrayTree, Array]:
        dataset.check_in_memory("online_sharpness", batch, "update it by one of the batches at a time")
        length = _lanczos.norm(psi)
        step = alpha / jnp.where(length > 0, length, 1)
        moved = jax.tree.map(lambda p, x: p + step.astype(p.dtype) * x, params, psi)
        gradient = jax.grad(loss)
        mix = lambda x, after, before: (1 - gamma) * x + (gamma / alpha) * (after - before)
        psi = jax.tree.map(mix, psi, gradient(moved, batch), gradient(params, batch))
        return psi, _lanczos.norm(psi)

    return OnlineSharpness(init, update)
