"""Curvature of a loss: linear operators, one Lanczos recurrence, eigenpairs and the sharpness λ_max."""

from jaxnet.curvature.density import SpectralDensity, spectral_density
from jaxnet.curvature.eigsh import Eigenpairs, eigsh
from jaxnet.curvature.gauss_newton import fisher, gauss_newton
from jaxnet.curvature.online import OnlineSharpness, online_sharpness
from jaxnet.curvature.operators import LinearOperator, hessian, materialize, precondition, restrict, shift
from jaxnet.curvature.second_moment import empirical_fisher, gradient_covariance
from jaxnet.curvature.sharpness import Sharpness, sharpness
from jaxnet.curvature.stochastic import Estimate, diagonal, trace
from jaxnet.curvature.track import Track, Tracker, TrackObserver, track

__all__ = [
    "Eigenpairs",
    "Estimate",
    "LinearOperator",
    "OnlineSharpness",
    "Sharpness",
    "SpectralDensity",
    "Track",
    "TrackObserver",
    "Tracker",
    "diagonal",
    "eigsh",
    "empirical_fisher",
    "fisher",
    "gauss_newton",
    "gradient_covariance",
    "hessian",
    "materialize",
    "online_sharpness",
    "precondition",
    "restrict",
    "sharpness",
    "shift",
    "spectral_density",
    "trace",
    "track",
]
