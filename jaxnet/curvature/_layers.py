"""The largest curvature within each layer."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature._eigsh import eigsh
from jaxnet.curvature._hessian import hessian
from jaxnet.curvature._operators import restrict
from jaxnet.curvature._products import HessianProduct, by_derivatives
from jaxnet.curvature._search import Eigenpairs


@contract.takes_loss
@dataset.on_automatic_axes
def layer_sharpness(
    loss: Loss,
    params: ArrayTree,
    batch: Any,
    *,
    key: Array,
    groups: Mapping[str, ArrayTree | str] | None = None,
    tol: float = 1e-3,
    product: HessianProduct = by_derivatives,
) -> dict[str, Eigenpairs]:
    """λ_max of each layer's diagonal block of the Hessian: the limit 2/λ of a rate for that layer alone.

    None is above λ_max of the whole, and the whole is at most the sum of all.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point.
      batch: the examples, or a data set in batches, as for `hessian`.
      key: a `jax.random.key` for the start vectors.
      groups: a name for each group of leaves, and what `restrict` takes for it, such as ``{"biases": "*/bias"}``. By
        default the leaves that lie together are a group, which has their path as its name.
      tol: relative accuracy of each value.
      product: how Hv is had, as for `hessian`.

    Returns:
      The `Eigenpairs` of each group, by its name.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract, or a group names no leaf.
    """
    op = hessian(loss, params, batch, product=product)
    if groups is not None and not isinstance(groups, Mapping):
        raise TypeError(f"groups: expected names with what restrict takes for each, got {type(groups).__name__}")
    if groups is None:
        layers = list(map(contract.layer_of, op.space.names))
        groups = {
            layer: jax.tree.unflatten(op.space.structure, [other == layer for other in layers])
            for layer in dict.fromkeys(layers)
        }
    return {
        name: eigsh(restrict(op, mask), tol=tol, key=jax.random.fold_in(key, i))
        for i, (name, mask) in enumerate(groups.items())
    }
