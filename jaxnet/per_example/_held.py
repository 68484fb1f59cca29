"""The N gradients of every leaf of the params, held by factors where they can be."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.per_example import _taps
from jaxnet.per_example._leaves import Factored, Formed, Leaves, at_once, wide
from jaxnet.per_example._looked import Looked, merged
from jaxnet.per_example._rules import Tap, leaf_of
from jaxnet.per_example._stacked import Stacked, factored

# Leaves of so many numbers are carried as they are, N copies of them: biases and scales.
_SMALL = 4096
# The Gram matrix comes in at most so many bands, of so many rows at least; more would only take longer to compile.
_BANDS, _BAND = 4, 256

Factors = tuple[Any, ...]
"""For each leaf that is a product's kernel ``(a (N, S, T, d), δ (N, S, T, p))``, for a small one its gradients
``(N, ...)``, for any other None; in float32 at least."""

Group = Factored | Looked | Stacked | Formed


@dataclasses.dataclass(frozen=True)
class Held:
    """The gradients of some examples, by their factors; where ``counted`` is false, 0."""

    loss: Loss
    params: ArrayTree
    batch: ArrayTree
    factors: Factors
    counted: Array | None = None

    def only(self, counted: Array) -> "Held":
        """Those of some examples, and 0 for the others, finite or not: a weight of 0 would not do."""
        factors = jax.tree.map(lambda x: _where(counted, x), self.factors)
        return dataclasses.replace(self, factors=factors, counted=counted)

    @property
    def _groups(self) -> list[tuple[list[int], Group]]:
        """Leaves that are held alike, by their positions."""
        leaves = jax.tree.leaves(self.params)
        found = _taps.trace(self.loss, self.params, self.batch)
        groups: list[tuple[list[int], Group]] = []
        for i, (leaf, taps, held) in enumerate(zip(leaves, found.taps, self.factors, strict=True)):
            if isinstance(held, tuple) and not isinstance(taps, str):
                like = jax.ShapeDtypeStruct(leaf.shape, wide(leaf).dtype)
                groups.append(([i], factored(held[0], held[1], taps[0].matrix, like)))
        small = [i for i, held in enumerate(self.factors) if isinstance(held, jax.Array)]
        if small:
            groups.append(
                (small, Formed(tuple(self.factors[i] for i in small), lambda g: g, contract.num_examples(self.batch)))
            )
        others = [i for i, held in enumerate(self.factors) if held is None]
        if others:
            size = sum(leaves[i].size for i in others)
            groups.append((others, Formed((self.batch, self.counted), self._former(others), at_once(size))))
        return groups

    def _former(self, chosen: list[int]) -> Callable[[Any], Leaves]:
        leaves, structure = jax.tree.flatten(self.params)

        def one(some: Leaves, example: ArrayTree) -> Array:
            replaced = list(leaves)
            for i, leaf in zip(chosen, some, strict=True):
                replaced[i] = leaf
            return self.loss(jax.tree.unflatten(structure, replaced), jax.tree.map(lambda x: x[None], example))

        def form(chunk: tuple[ArrayTree, Array | None]) -> Leaves:
            examples, counted = chunk
            found = jax.vmap(jax.grad(one), in_axes=(None, 0))(tuple(leaves[i] for i in chosen), examples)
            return jax.tree.map(lambda g: wide(g) if counted is None else _where(counted, wide(g)), found)

        return form

    def _gather(self, method: Callable[[Group, Leaves], Leaves], tree: ArrayTree | None = None) -> ArrayTree:
        """Of a method that gives something for each leaf: a pytree like params."""
        leaves, structure = jax.tree.flatten(self.params)
        given = leaves if tree is None else jax.tree.leaves(tree)
        result: list[Any] = [None] * len(leaves)
        for chosen, group in self._groups:
            for i, x in zip(chosen, method(group, tuple(given[i] for i in chosen)), strict=True):
                result[i] = x
        return jax.tree.unflatten(structure, result)

    def squares(self) -> ArrayTree:
        """‖g_n‖² of each leaf, (N,)."""
        return self._gather(lambda group, _: group.squares())

    def vdots(self, tree: ArrayTree) -> ArrayTree:
        """g_n·v of each leaf, (N,)."""
        return self._gather(lambda group, v: group.vdot(v), tree)

    def vdot(self, tree: ArrayTree) -> Array:
        """g_n·v, (N,)."""
        return over_leaves(self.vdots(tree))

    def weighted_sum(self, weights: Array) -> ArrayTree:
        """Σ w_n g_n, like params."""
        return self._gather(lambda group, _: group.weighted_sum(weights))

    def sum_of_squares(self) -> ArrayTree:
        """Σ g_n², like params."""
        return self._gather(lambda group, _: group.sum_of_squares())

    def squared_distances(self, tree: ArrayTree) -> ArrayTree:
        """‖g_n − v‖² of each leaf, (N,)."""
        return self._gather(lambda group, v: group.deviations(v)[0], tree)

    def sum_of_deviations(self, tree: ArrayTree) -> ArrayTree:
        """Σ (g_n − v)², like params."""
        return self._gather(lambda group, v: group.deviations(v)[1], tree)

    def gram(self) -> Array:
        """g_n·g_m, (N, N), of which only the blocks on and above the diagonal are found."""
        n = contract.num_examples(self.batch)
        # What must be formed anew for each block is taken whole.
        size = n if any(held is None for held in self.factors) else max(_BAND, -(-n // _BANDS))
        starts = range(0, n, size)
        groups = [group for _, group in self._groups]
        bands: list[list[Any]] = [[group.rows(start, start + size) for group in groups] for start in starts]
        block = lambda i, j: sum((x.products(y) for x, y in zip(bands[i], bands[j], strict=True)), jnp.zeros(()))
        count = range(len(starts))
        upper = {(i, j): block(i, j) for i in count for j in count if i <= j}
        return jnp.block([[upper[i, j] if i <= j else upper[j, i].T for j in count] for i in count])

    def dense(self) -> ArrayTree:
        """All g_n, leaves (N, ...)."""
        return self._gather(lambda group, _: group.dense())


def over_leaves(tree: ArrayTree) -> Array:
    """What is an array for each leaf, as one: their sum."""
    leaves: list[Any] = jax.tree.leaves(tree)
    return functools.reduce(jnp.add, leaves)


def _where(counted: Array, x: Array) -> Array:
    return jnp.where(counted.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def hold(loss: Loss, params: ArrayTree, batch: ArrayTree) -> tuple[Factors, Array]:
    """What is held of the examples' gradients, and their losses (N,)."""
    rows, carried, values = factors_of(loss, params, batch)
    found, leaves = _taps.trace(loss, params, batch), jax.tree.leaves(params)
    formed = {i: _smaller(found.taps[i], held, leaves[i]) for i, held in rows.items()}
    return tuple({**formed, **carried}.get(i) for i in range(len(leaves))), values


def factors_of(loss: Loss, params: ArrayTree, batch: ArrayTree) -> tuple[dict[int, Any], dict[int, Array], Array]:
    """The factors ``(a (N, S, T, d), δ (N, S, T, p))`` of the tapped leaves, the gradients of small ones, and E_n, by
    one backward pass with respect to a zero at each kernel's output."""
    contract.check(loss, params, batch)
    found, leaves = _taps.trace(loss, params, batch), jax.tree.leaves(params)
    tapped = {i: taps for i, taps in enumerate(found.taps) if not isinstance(taps, str)}
    small = [i for i, leaf in enumerate(leaves) if i not in tapped and leaf.size <= _SMALL]

    def one(example: ArrayTree) -> tuple[dict[int, Any], dict[int, Array], Array]:
        def value(epsilons: _taps.Epsilons, carried: dict[int, Array]) -> tuple[Array, dict[_taps.Use, Array]]:
            replaced = [carried.get(i, leaf) for i, leaf in enumerate(leaves)]
            return found.evaluate(replaced, example, epsilons)

        epsilons = {use: jnp.zeros(tap.output.shape, tap.output.dtype) for use, tap in found.uses.items()}
        (own, others), (deltas, carried) = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(
            epsilons, {i: leaves[i] for i in small}
        )
        rows = {use: _real(*tap.rows(others[use], deltas[use])) for use, tap in found.uses.items()}
        joined = {i: _joined(taps, [rows[i, j] for j in range(len(taps))], leaves[i]) for i, taps in tapped.items()}
        return joined, carried, own

    return jax.tree.map(wide, jax.vmap(one)(batch))


def _real(a: Array, delta: Array) -> tuple[Array, Array]:
    """Factors (S, T, ·) of a real leaf that met complex numbers: Re Σ_t a_t δ_tᵀ, of twice as many real rows."""
    if not jnp.iscomplexobj(a):
        return a, delta.real
    return jnp.concatenate([a.real, a.imag], axis=1), jnp.concatenate([delta.real, -delta.imag], axis=1)


def _joined(taps: tuple[Tap, ...], rows: list[tuple[Array, Array]], leaf: Array) -> tuple[Array, Array]:
    """The rows (S, T, ·) of a leaf's uses as those of one sum."""
    a, delta = (jnp.concatenate(parts, axis=1) for parts in zip(*rows, strict=True))
    if taps[0].lookup:
        d = jax.eval_shape(taps[0].matrix, leaf).shape[1]
        return jax.vmap(functools.partial(merged, d=d))(a, wide(delta))
    return a, delta


def _smaller(taps: tuple[Tap, ...] | str, held: tuple[Array, Array], leaf: Array) -> Any:
    """The factors, or the gradients Σ_t a_t δ_tᵀ themselves where those are fewer numbers."""
    a, delta = held
    (_, _, t, d), p = a.shape, delta.shape[-1]
    if isinstance(taps, str) or taps[0].lookup or t * (d + p) <= d * p:
        return held
    like = jax.ShapeDtypeStruct(leaf.shape, wide(leaf).dtype)
    one = lambda a, delta: leaf_of(taps[0].matrix, like, jnp.einsum("std,stp->sdp", a, delta))
    return jax.vmap(one)(a, delta)


def described(taps: tuple[Tap, ...] | str, held: Any) -> str:
    """How a leaf's gradients are held, and why."""
    if isinstance(taps, str):
        return f"carried: small; {taps}" if held is not None else f"vmap(grad): {taps}"
    if not isinstance(held, tuple):
        return "carried: fewer numbers than the factors of " + " and ".join(tap.description for tap in taps)
    _, layers, steps, _ = held[0].shape
    uses = " and ".join(tap.description for tap in taps)
    return f"factors of {uses}, {f'S = {layers}, ' if layers > 1 else ''}T = {steps}"
