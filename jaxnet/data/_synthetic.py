"""The lectures' two classes of points in the plane."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.contract import Array

CENTRE = (0.4, 0.8)
NOISE = 0.2


def _labels(num_examples: int) -> np.ndarray:
    if num_examples < 4 or num_examples % 2:
        raise ValueError(f"num_examples: expected an even number from 4 on, got {num_examples}")
    return np.repeat([1.0, -1.0], num_examples // 2)


def two_gaussians(*, key: Array, num_examples: int = 100) -> tuple[Array, Array]:
    """Two classes d = ±1 of points x = d·(.4, .8) + .2 z, z ~ N(0, I): E[xxᵀ] has eigenvalues .84 and .04.

    Args:
      key: a `jax.random.key` for z.
      num_examples: N, even; the first half has d = 1.

    Returns:
      Points (N, 2) and targets ±1 (N,).

    Raises:
      ValueError: N is odd or below 4.

    Reference:
      LeCun et al., "Efficient BackProp", 1998, section 5.1 (the linear network of figures 6 to 8).
    """
    targets = jnp.asarray(_labels(num_examples), jnp.result_type(float))
    noise = jax.random.normal(key, (num_examples, 2))
    return targets[:, None] * jnp.asarray(CENTRE) + NOISE * noise, targets


def two_gaussians_exact(num_examples: int = 100) -> tuple[Array, Array]:
    """One draw whose Hessian is known exactly: the noise has mean 0, is orthogonal to d, and ZᵀZ/N = I.

    With E = ½ mean (d − y)² of a linear neuron y = w·x + b, the weights' block has eigenvalues .04 and .84,
    and the bias, which this noise uncouples, adds 1.

    Args:
      num_examples: N, even; the first half has d = 1.

    Returns:
      Points (N, 2) and targets ±1 (N,).

    Raises:
      ValueError: N is odd or below 4.
    """
    targets = _labels(num_examples)
    draw = np.random.default_rng(0).normal(size=(num_examples, 2))
    # The first two columns of Q span {1, d}; the last two are the draw made orthonormal to them.
    q, _ = np.linalg.qr(np.column_stack([np.ones(num_examples), targets, draw]))
    points = targets[:, None] * np.array(CENTRE) + NOISE * np.sqrt(num_examples) * q[:, 2:]
    dtype = jnp.result_type(float)
    return jnp.asarray(points, dtype), jnp.asarray(targets, dtype)
