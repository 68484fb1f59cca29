"""λ_max and per-example gradients of an MLP's cross-entropy by other libraries, each over the same params and batch.

For λ_max, jaxnet beside them, a library is ``(solve, settings)``: ``solve(setting, seed)`` is an estimate from the
random start of that seed, and the setting is a tolerance where the library has one, else a number of products. Whatever
it prepares anew at new params is in its time; what only its first call compiles is not.
"""

import contextlib
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
        with warnings.catch_warnings(action="ignore"):
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


def gradient_libraries(params, batch):
    """Names such as "BackPACK's norms" -> function without arguments, for every library that is installed.

    The criterion is summed where the library allows for it: what comes is of the examples' own losses, and nothing has
    to be multiplied by N. The backward passes of Opacus and BackPACK leave the sum of the gradients behind as well.
    """
    found = {}
    for module, make in (("torch", _torch_func), ("opacus.grad_sample", _opacus), ("backpack", _backpack)):
        if peer := _imported(module):
            found |= make(peer, params, batch)
    return found


def _torch_func(torch, params, batch):
    model, criterion, data = _torch(params, batch)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    loss = lambda weights, x, y: criterion(torch.func.functional_call(model, weights, (x[None],)), y[None])
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return {"torch.func's dense": lambda: _like_params(each(weights, *data).values())}


def _opacus(grad_sample, params, batch):
    model, criterion, data = _torch(params, batch, "sum")
    ghost = grad_sample.GradSampleModuleFastGradientClipping(model, loss_reduction="sum")
    dense = grad_sample.GradSampleModule(_torch(params, batch)[0], loss_reduction="sum")
    samples = lambda: _like_params(weight.grad_sample for weight in dense.parameters())
    return {
        "Opacus's norms": _backward(ghost, criterion, data, ghost.get_norm_sample),
        "Opacus's dense": _backward(dense, criterion, data, samples),
    }


def _backpack(backpack, params, batch):
    model, criterion, data = _torch(params, batch, "sum")
    model, criterion, extensions = backpack.extend(model), backpack.extend(criterion), backpack.extensions
    norms = lambda: sum(weight.batch_l2 for weight in model.parameters()).sqrt()
    second_moment = lambda: _like_params(weight.sum_grad_squared / len(data[0]) for weight in model.parameters())
    dense = lambda: _like_params(weight.grad_batch for weight in model.parameters())
    using = lambda extension, read: _backward(model, criterion, data, read, lambda: backpack.backpack(extension))
    return {
        "BackPACK's norms": using(extensions.BatchL2Grad(), norms),
        "BackPACK's second moment": using(extensions.SumGradSquared(), second_moment),
        "BackPACK's dense": using(extensions.BatchGrad(), dense),
    }


def _backward(model, criterion, data, read, context=contextlib.nullcontext):
    inputs, labels = data

    def run():
        model.zero_grad(set_to_none=True)
        with context():
            criterion(model(inputs), labels).backward()
        return read()

    return run


def _like_params(tensors):
    """Each layer's weight and bias, laid out as in jaxnet's params; a transpose is a view."""
    tensors = iter(tensors)
    return [{"kernel": weight.mT, "bias": bias} for weight, bias in zip(tensors, tensors, strict=True)]


def _torch(params, batch, reduction="mean"):
    """The same network, weights and batch in PyTorch."""
    import torch

    modules = []
    for layer in filter(None, params):
        kernel, bias = np.array(layer["kernel"]), np.array(layer["bias"])
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = torch.tensor(kernel.T), torch.tensor(bias)
        modules += [linear, torch.nn.Tanh()]
    data = torch.tensor(np.array(batch[0])), torch.tensor(np.array(batch[1])).long()
    return torch.nn.Sequential(*modules[:-1]), torch.nn.CrossEntropyLoss(reduction=reduction), data
