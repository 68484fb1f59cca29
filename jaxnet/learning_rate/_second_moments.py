"""Where the mean square of an optimizer's distance begins to grow: two rates around it, by second moments.

In the coordinates R^-½ω an optimizer with one momentum takes u = −η(a g + w m), m ← ρm + g, with g = Cω + ξ, C the
mean of the examples' matrices C_n, and ξ the noise of a batch. With M the second moment of ω and p(mean C_nMC_n − CMC)
that of the noise, M goes on to Σ_t h_t W h_t′ of this W, with h the answer to an impulse: a number for each pair of C's
eigenvectors. The mean square grows from the rate on at which this map of M has an eigenvalue of 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnet import dataset, losses
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature import Eigensolver, LinearOperator, Space, pushforward
from jaxnet.learning_rate._settled import Recursion

# Examples that moments are followed over, those whose directions span them, and directions of each.
FOLLOWED, _SPANNING, _RANK = 512, 64, 4
# Numbers that the spanning directions may hold, and the fewest examples worth the work.
_HELD, _FEWEST = 2**26, 16
# Octaves below the limit without noise in which the rate lies, steps of the search for it, and terms of an impulse's
# answer: 2^18.
_OCTAVES, _STEPS, _DOUBLINGS = 16.0, 6, 18
# The relative accuracy of the eigenvalue, and the least that is told from none.
_TOLERANCE, _LEAST = 0.02, 2.0**-40

# Near 1 an eigenvalue's power is sensitive to what an accelerator rounds off.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def num_spanning(params: ArrayTree, num_examples: int) -> int:
    """How many examples' directions fit in memory; 0 if too few."""
    num_params = sum(x.size for x in jax.tree.leaves(params))
    found = min(num_examples, _SPANNING, _HELD // (_RANK * max(num_params, 1)))
    return found if found >= min(_FEWEST, num_examples) else 0


def ends(
    loss: Loss,
    params: ArrayTree,
    sample: ArrayTree,
    root: tuple[Array, ...],
    recursion: Recursion,
    n: Array | float,
    share: Array | float,
    largest: Array | float,
    key: Array,
    *,
    spanning: int,
) -> tuple[Array, Array, Array]:
    """Two rates around the limit, and the trace of the mean of what is followed.

    The lower one is that of a few examples as if they were all: each then weighs more than it does, and the mean square
    grows earlier. The higher one is of many examples, with M in the span of those few's directions: what grows
    elsewhere is left out, so that it is seen to grow too late. Of each example the four sharpest directions are taken,
    so that these are estimates and no bounds where its matrix has a higher rank.

    Args:
      loss: of `mean_loss`.
      params: the point.
      sample: examples in memory, drawn at random.
      root: √R for a gradient that stays, as `Space.ravel` lays out what is like params.
      recursion: the optimizer's.
      n: N, all the examples there are.
      share: p, above 0.
      largest: 2 over the limit without noise, of all examples.
      key: for the random start of the search for directions.
      spanning: how many examples span the directions; see `num_spanning`.
    """
    num, starts = jax.tree.leaves(sample)[0].shape[0], Space.of(params).starts

    def rows_from(start: int) -> Array:
        chunk = jax.tree.map(lambda x: x[start : start + spanning], sample) if num > spanning else sample
        return factors(loss, params, chunk, root, key, starts)

    few, basis, followed = _spanned(rows_from(0))
    # A chunk at a time, so that all rows are never held, and all of one size, so that the network is compiled once: the
    # last one overlaps.
    many = [few, *(_in_basis(rows_from(start), basis) for start in range(spanning, num - spanning + 1, spanning))]
    if rest := num % spanning:
        many.append(_in_basis(rows_from(num - spanning), basis)[spanning - rest :])
    every = jnp.concatenate(many) if len(many) > 1 else few
    found = np.stack([_limits_of(of, recursion, n, share, largest) for of in (few, every)])
    return found.min(), found.max(), followed


@jax.jit
def _spanned(rows: Array) -> tuple[Array, Array, Array]:
    """Some examples' rows in an orthonormal basis of them, the basis, and their matrices' mean trace."""
    flat = rows.reshape(-1, rows.shape[-1])
    values, vectors = jnp.linalg.eigh(flat @ flat.T)
    basis = (vectors * _inverse_root(values)).T @ flat
    return rows @ basis.T, basis, jnp.square(rows).sum() / rows.shape[0]


@jax.jit
def _in_basis(rows: Array, basis: Array) -> Array:
    return rows @ basis.T


@jax.jit
def _limits_of(
    factors: Array, recursion: Recursion, n: Array | float, share: Array | float, largest: Array | float
) -> Array:
    """Two rates around the limit by the factors of some examples."""
    size = factors.shape[0]
    # The mean of few examples has some of the noise's part already.
    kept = jnp.maximum((share - (1 / size - 1 / n)) / (1 - (1 / size - 1 / n)), 0)
    noisy, still = _inverse_limits(factors, recursion, kept)
    # What the mean has beyond these examples and directions counts in full, or in the share 1 − p in which the mean of
    # a batch is that of all.
    return jnp.stack([2 / (noisy + part * (largest - still)) for part in (1.0, 1 - share)])


def _inverse_root(values: Array) -> Array:
    """1/√λ, and 0 where λ is so to rounding."""
    kept = values > 10 * values.size * jnp.finfo(values.dtype).eps * values.max()
    return jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)


@functools.partial(jax.jit, static_argnames="loss")
def factors(
    loss: Loss, params: ArrayTree, data: ArrayTree, roots: tuple[Array, ...], key: Array, starts: tuple[Any, ...]
) -> Array:
    """Y_n (N, k, P) with Y_n′Y_n next to R^½C_nR^½ and not above it.

    By Nyström's formula from k random directions, once multiplied by the matrix.

    Reference:
      Halko, Martinsson & Tropp, "Finding Structure with Randomness", SIAM Review 2011, section 5.5.
    """
    parts = losses.parts_of(loss)[0]
    # Where leaves may lie apart, the parts are those leaves in their shapes.
    joined = lambda parts: jnp.concatenate([x.reshape(-1) for x in parts])
    space, root = Space.of(params), joined(roots)
    start = jax.random.normal(key, (min(_RANK, root.size), root.size), root.dtype)

    def unravel(v: Array) -> ArrayTree:
        parts = jnp.split(v, np.cumsum([x.size for x in roots])[:-1])
        shaped = (x.astype(like.dtype).reshape(like.shape) for x, like in zip(parts, roots, strict=True))
        return space.unravel(tuple(shaped), starts)

    def of_example(example: ArrayTree) -> Array:
        one = jax.tree.map(lambda x: x[None], example)
        network = lambda p: parts.outputs(p, one)
        outputs, pull = jax.vjp(network, params)
        slope = jax.grad(lambda o: parts.criterion(o, one[1]).sum())

        def product(v: Array) -> Array:
            along = pushforward(network, params, unravel(root * v))[1]
            return root * joined(space.ravel(pull(jax.jvp(slope, (outputs,), (along,))[1])[0]))

        # Twice the same, of which the first time only gives the directions: so it is compiled once.
        def multiply(directions: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            products = lax.map(product, directions)
            return jnp.linalg.qr(products.T)[0].T, (directions, products)

        _, seen = lax.scan(multiply, start, length=2)
        directions, products = (x[1] for x in seen)
        values, vectors = jnp.linalg.eigh(directions @ products.T)
        return (vectors * _inverse_root(values)).T @ products

    return dataset.rows(jax.vmap(of_example), data, size=8)


def _inverse_limits(factors: Array, recursion: Recursion, share: Array) -> tuple[Array, Array]:
    """2/η where the mean square begins to grow, and 2/η of the mean alone."""
    size, rank, _ = factors.shape
    rows = factors.reshape(size * rank, -1)
    values, vectors = jnp.linalg.eigh(rows.T @ rows / size)
    values = jnp.maximum(values, 0)
    rows = rows @ vectors
    still = values[-1] * (recursion.a - recursion.w / (1 + recursion.rho))
    space = Space.of(jnp.zeros((values.size, values.size), rows.dtype))
    solver = Eigensolver(space, warm=True)
    blocks = rows.reshape(size, rank, -1)

    def step(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        del index
        low, above, high, below, moment = state
        # In octaves the eigenvalue falls by about one an octave: nearly a line.
        middle = (low * below - high * above) / (below - above)
        gain = _gains(values, jnp.exp2(-middle) * 2 / still, recursion)
        op = LinearOperator(_noise_met, space, (blocks, values, jnp.sqrt(jnp.maximum(share * gain, 0))))
        pairs, _ = solver.search(op, solver.start(jax.random.key(0), moment), _TOLERANCE)
        found = jnp.log2(jnp.maximum(pairs.values[0], _LEAST))
        grows = ~(found < 0)
        # An end that stays counts half (the Illinois rule), so that both come near.
        low, above = jnp.where(grows, middle, low), jnp.where(grows, found, above / 2)
        high, below = jnp.where(grows, high, middle), jnp.where(grows, below / 2, found)
        return low, above, high, below, pairs.vectors[0]

    # In octaves below the limit without noise, which it is where the few examples' mean has all of the noise already.
    number = functools.partial(jnp.asarray, dtype=rows.dtype)
    start = number(0), number(_OCTAVES / 2), number(_OCTAVES), number(-_OCTAVES / 2), jnp.diag(values)
    low, above, high, below, _ = lax.fori_loop(0, _STEPS, step, start)
    octaves = (low * below - high * above) / (below - above)
    return jnp.where(share > 0, jnp.exp2(octaves), 1) * still, still


def _noise_met(operands: tuple[Array, Array, Array], m: Array) -> Array:
    """√g (mean C_nMC_n − CMC) √g, element by element, with M = √g m."""
    blocks, values, root = operands
    size, rank, r = blocks.shape
    moment = root * m
    rows = blocks.reshape(-1, r)
    inner = _einsum("ncr,ndr->ncd", _matmul(rows, moment).reshape(size, rank, r), blocks)
    scattered = _matmul(inner, blocks).reshape(-1, r)
    return root * (_matmul(rows.T, scattered) / size - values[:, None] * moment * values[None, :])


def _gains(values: Array, rate: Array, recursion: Recursion) -> Array:
    """Σ_t h_t(λ_k) h_t(λ_l): the second moment of ω's parts by noise of second moment 1 at each step.

    By the state z = (x, m), z ← A z + b ξ, whose moments' series is summed by doubling its length.
    """
    a, w, rho = recursion
    one = jnp.ones_like(values)
    step = jnp.array([[1 - rate * a * values, -rate * w * one], [values, rho * one]])
    step = jnp.moveaxis(step, 2, 0)
    kick = jnp.array([-rate * a, 1.0])
    first = jnp.broadcast_to(jnp.outer(kick, kick), (values.size, values.size, 2, 2))

    def double(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        total, powers = state
        moved = _einsum("kab,klbc,ldc->klad", powers, total, powers)
        return total + moved, _matmul(powers, powers)

    return lax.fori_loop(0, _DOUBLINGS, double, (first.astype(values.dtype), step))[0][..., 0, 0]
