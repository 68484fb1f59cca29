"""Curvature of a loss: linear operators, one Lanczos recurrence, eigenpairs and the sharpness λ_max."""

from jaxnet.curvature._density import SpectralDensity, spectral_density
from jaxnet.curvature._eigsh import eigsh, overlap
from jaxnet.curvature._follow import LEADING, Leading, follow
from jaxnet.curvature._gauss_newton import fisher, gauss_newton
from jaxnet.curvature._hessian import hessian, quadratic_form, quadratic_forms
from jaxnet.curvature._landscape import Landscape, filter_normalised, landscape
from jaxnet.curvature._layers import layer_sharpness
from jaxnet.curvature._online import OnlineSharpness, online_sharpness
from jaxnet.curvature._operators import (
    LinearOperator,
    flattened,
    materialize,
    precondition,
    restrict,
    shift,
    unflattened,
)
from jaxnet.curvature._products import (
    Differences,
    HessianProduct,
    by_derivatives,
    forward_over_reverse,
    pushforward,
    reverse_over_reverse,
)
from jaxnet.curvature._search import Eigenpairs, Eigensolver
from jaxnet.curvature._second_moment import empirical_fisher, gradient_covariance
from jaxnet.curvature._sharpness import Sharpness, sharpness
from jaxnet.curvature._solve import Solution, solve
from jaxnet.curvature._space import Space
from jaxnet.curvature._stochastic import Estimate, diagonal, trace
from jaxnet.curvature._track import Track, Tracker, TrackObserver, track

__all__ = [
    "LEADING",
    "Differences",
    "Eigenpairs",
    "Eigensolver",
    "Estimate",
    "HessianProduct",
    "Landscape",
    "Leading",
    "LinearOperator",
    "OnlineSharpness",
    "Sharpness",
    "Solution",
    "Space",
    "SpectralDensity",
    "Track",
    "TrackObserver",
    "Tracker",
    "by_derivatives",
    "diagonal",
    "eigsh",
    "empirical_fisher",
    "filter_normalised",
    "fisher",
    "flattened",
    "follow",
    "forward_over_reverse",
    "gauss_newton",
    "gradient_covariance",
    "hessian",
    "landscape",
    "layer_sharpness",
    "materialize",
    "online_sharpness",
    "overlap",
    "precondition",
    "pushforward",
    "quadratic_form",
    "quadratic_forms",
    "restrict",
    "reverse_over_reverse",
    "sharpness",
    "shift",
    "solve",
    "spectral_density",
    "trace",
    "track",
    "unflattened",
]


def __dir__() -> list[str]:
    return sorted(__all__)
