"""Curvature of a loss: linear operators, one Lanczos recurrence, eigenpairs and the sharpness λ_max."""

from jaxnet.curvature.eigsh import Eigenpairs, eigsh
from jaxnet.curvature.operators import LinearOperator, hessian, materialize
from jaxnet.curvature.sharpness import Sharpness, sharpness

__all__ = ["Eigenpairs", "LinearOperator", "Sharpness", "eigsh", "hessian", "materialize", "sharpness"]
