"""Curvature of a loss: linear operators, one Lanczos recurrence, eigenpairs and the sharpness λ_max."""

from jaxnet.curvature.eigsh import Eigenpairs, eigsh
from jaxnet.curvature.gauss_newton import fisher, gauss_newton
from jaxnet.curvature.operators import LinearOperator, hessian, materialize, precondition, restrict, shift
from jaxnet.curvature.second_moment import empirical_fisher, gradient_covariance
from jaxnet.curvature.sharpness import Sharpness, sharpness

__all__ = [
    "Eigenpairs",
    "LinearOperator",
    "Sharpness",
    "eigsh",
    "empirical_fisher",
    "fisher",
    "gauss_newton",
    "gradient_covariance",
    "hessian",
    "materialize",
    "precondition",
    "restrict",
    "sharpness",
    "shift",
]
