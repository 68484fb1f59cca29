"""λ_max of an MLP's cross-entropy by jaxnet and by other libraries, each over the same params and batch.

A library is ``(solve, settings)``: ``solve(setting, seed)`` is an estimate from the random start of that seed, and the
setting is a tolerance where the library has one, else a number of products. Whatever it prepares anew at new params is
in its time; what only its first call compiles is not.
"""

import functools
import importlib
import warnings

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import eigsh

from jaxnet import curvature

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
STEPS = (2, 4, 8, 16, 32, 64)


def libraries(loss, params, batch):
    """Name -> ``(solve, settings)`` of every library that is installed."""
    found = {"jaxnet": (_jaxnet(loss, params, batch), TOLERANCES)}
    for name, module, make, settings in (
        ("PyHessian", "pyhessian", _pyhessian, TOLERANCES),
        ("curvlinops + ARPACK", "curvlinops", _curvlinops, TOLERANCES),
        ("hessian-eigenthings", "hessian_eigenthings", _eigenthings, STEPS),
        ("matfree", "matfree.decomp", _matfree, STEPS[:-1]),
    ):
        if peer := _imported(module):
            found[name] = (make(peer, loss, params, batch), settings)
    return found


@functools.cache
def _imported(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f"{module} is not installed: its rows are left out")
        return None


def flat_product(loss, params, batch):
    """The Hessian product over flat vectors, written out; and the number of params."""
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda w, batch: loss(unravel(w), batch))
    return lambda v: jax.jvp(lambda w: gradient(w, batch), (flat,), (v,))[1], flat.size


def _jaxnet(loss, params, batch):
    def solve(tol, seed):
        found = curvature.sharpness(loss, params, batch, key=jax.random.key(seed), tol=tol)
        return float(jax.block_until_ready(found).value)

    return solve


def _matfree(decomp, loss, params, batch):
    @jax.jit(static_argnames="steps")
    def largest(params, batch, key, steps):
        product, n = flat_product(loss, params, batch)
        found = decomp.tridiag_sym(steps)(product, jax.random.normal(key, (n,)))
        return jax.numpy.linalg.eigvalsh(found.J_small)[-1]

    return lambda steps, seed: float(largest(params, batch, jax.random.key(seed), steps))


def _pyhessian(pyhessian, loss, params, batch):
    import torch

    model, criterion, data = _torch(params, batch)

    def solve(tol, seed):
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        with warnings.catch_warnings(action="ignore"):
            hessian = pyhessian.hessian(model, criterion, data=data, cuda=False)
        # Its own limit of 100 steps goes with its own tolerance, 1e-3.
        return hessian.eigenvalues(maxIter=100 if tol >= 1e-3 else 1000, tol=tol)[0][0]

    return solve


def _curvlinops(curvlinops, loss, params, batch):
    model, criterion, data = _torch(params, batch)

    def solve(tol, seed):
        op = curvlinops.HessianLinearOperator(
            model, criterion, list(model.parameters()), [data], check_deterministic=False
        )
        start = np.random.default_rng(seed).normal(size=op.shape[0])
        return eigsh(op.to_scipy(), k=1, which="LA", tol=tol, v0=start, return_eigenvectors=False)[0]

    return solve


def _eigenthings(eigenthings, loss, params, batch):
    model, criterion, data = _torch(params, batch)

    def solve(steps, seed):
        op = eigenthings.HessianOperator(model, [data], eigenthings.supervised_loss(criterion))
        return eigenthings.lanczos(op, k=1, max_iter=steps, which="LA", seed=seed).eigenvalues[0].item()

    return solve


def _torch(params, batch):
    """The same network, weights and batch in PyTorch."""
    import torch

    modules = []
    for layer in filter(None, params):
        kernel, bias = np.array(layer["kernel"]), np.array(layer["bias"])
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = torch.tensor(kernel.T), torch.tensor(bias)
        modules += [linear, torch.nn.Tanh()]
    data = torch.tensor(np.array(batch[0])), torch.tensor(np.array(batch[1])).long()
    return torch.nn.Sequential(*modules[:-1]), torch.nn.CrossEntropyLoss(), data
