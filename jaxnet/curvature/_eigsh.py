"""A few eigenpairs of a symmetric operator, to a stated accuracy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree
from jaxnet.curvature._operators import LinearOperator, flattened, inner, unflattened
from jaxnet.curvature._search import Eigenpairs, Eigensolver
from jaxnet.mesh import check_together


def eigsh(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    key: Array,
    v0: ArrayTree | None = None,
    ncv: int | None = None,
) -> Eigenpairs:
    """The k eigenvalues at one end, or both ends, of a symmetric operator's spectrum, with their vectors.

    The error of a Ritz value θ with residual r and gap g to the next is about min(r, r²/g), if no eigenvalue near it is
    still unseen. So the search ends when that estimate is within tol·|θ| and, from a random start, the Lanczos
    polynomials leave a chance of at most 2 % that an eigenvalue lies further out than the tolerance; or when for four
    steps in a row r itself is within a third of it, and none is likely to lie further out than a third of the gap. The
    second rule is an empirical one, and cheaper where the spectrum is dense: on spectra with two to five eigenvalues
    within 10⁻⁵ to 10 % of the outermost, 1 search in 1000 ended further off than its tolerance.
    Rounding leaves an eigenvalue uncertain by some eps·‖A‖. Where the tolerance asks for less than four of these, or
    more after thousands of products, as it does of an eigenvalue next to 0, the search ends as near as it comes, and
    ``converged`` is False.
    Distinct eigenvalues are found; how often one occurs is not claimed.

    Args:
      op: a `LinearOperator`.
      k: how many.
      which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude, "BE" half from each end.
      tol: relative accuracy of the eigenvalues.
      max_matvecs: a limit on the products; by default enough for any gap that the dtype resolves.
      key: a `jax.random.key` for the start vector.
      v0: a start vector like params, such as the last eigenvector found nearby; a hundredth of a random one is added.
      ncv: how many Lanczos vectors are kept at most, beside one to go on with; by default 2k + 12. With k + 3 of them
        extreme values are found in the least memory, by more products.

    Returns:
      `Eigenpairs`. Inside a jit too, ``converged`` tells what an exception could not.

    Raises:
      ValueError: k, which, tol or max_matvecs is out of range.

    Reference:
      Parlett, "The Symmetric Eigenvalue Problem", 1998, sections 11.7 and 13.2.

    Examples:
      >>> loss = lambda w, batch: losses.squared_error(batch[0] @ w, batch[1]).mean()
      >>> op = curvature.hessian(loss, jnp.zeros(2), data.two_gaussians_exact())
      >>> print(curvature.eigsh(op, 2, key=jax.random.key(0)).values.round(2))
      [0.84 0.04]
    """
    contract.check_tolerance(tol)
    flat = flattened(op)
    check_together(op=op.operands, v0=v0)
    if v0 is not None:
        op.space.check("v0", v0)
    return _eigsh(Eigensolver(flat.space, k, which, max_matvecs, ncv, v0 is not None), flat, v0, key, tol)


@functools.partial(dataset.jit, static_argnames="solver")
def _eigsh(solver: Eigensolver, op: LinearOperator, v0: ArrayTree | None, key: Array, tol: Array | float) -> Eigenpairs:
    start = solver.start(key, None if v0 is None else inner(op).space.ravel(v0))
    pairs, _ = solver.search(op, start, tol)
    return dataclasses.replace(pairs, vectors=unflattened(op, pairs.vectors))


def overlap(pairs: Eigenpairs, tree: ArrayTree) -> Array:
    """Σ_i (v_i·g)²/‖g‖², the share of a vector's square that lies in the span of the eigenvectors, in [0, 1].

    Of a gradient in the span of as many leading eigenvectors as there are classes it is most of the whole soon after a
    run begins; of a random vector it is about k/n. As the vectors are found to the square root of their values'
    tolerance only, so is the share: ask `eigsh` for 1e-4 or less.

    Args:
      pairs: what `eigsh` found, k of them.
      tree: g, like params: a gradient, an update, the way from one point to another.

    Returns:
      A scalar; NaN for a vector of length 0.

    Raises:
      ValueError: ``tree`` is not like the vectors.

    Reference:
      Gur-Ari, Roberts & Dyer, "Gradient Descent Happens in a Tiny Subspace", 2018, eq. 2.
    """
    contract.check_alike("tree", tree, jax.tree.map(lambda v: v[0], pairs.vectors))
    tree = jax.tree.map(lambda x, v: jnp.asarray(x, v.dtype), tree, pairs.vectors)
    along = jax.vmap(lambda v: optax.tree.vdot(v, tree))(pairs.vectors)
    return jnp.sum(along**2) / optax.tree.norm(tree, squared=True)
