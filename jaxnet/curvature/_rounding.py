"""What rounding leaves of eigenvalues and of the products that they are found by.

Where a product is the difference of large intermediate results, as for a loss that is all but 0, it is rounded to their
size and not to its own. A symmetric matrix has each entry twice, and by how far products disagree on it, their error
shows.
"""

import jax.numpy as jnp

from jaxnet.contract import Array

# What any product is rounded by, in eps‖A‖.
_ROUNDING = 4
# A product's error, in units of what it and others disagree by within a basis, which sees a part of it: of networks
# whose loss goes to 0 it was 1.1 to 3.
_PER_DISAGREEMENT = 3


def of_norm(norm: Array) -> Array:
    """What is left of any eigenvalue of a matrix of that norm."""
    return _ROUNDING * jnp.finfo(norm.dtype).eps * norm


def product_error(norm: Array, disagreement: Array) -> Array:
    """About how far products of unit vectors are from a symmetric matrix's, beyond what any product is rounded by."""
    return _PER_DISAGREEMENT * jnp.maximum(disagreement - of_norm(norm), 0)


def of_value(norm: Array, disagreement: Array) -> Array:
    """Below which nothing is known of an eigenvalue."""
    return jnp.maximum(of_norm(norm), product_error(norm, disagreement))
