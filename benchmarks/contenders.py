"""Who sets the rate: the derived one, a sweep, defaults, range tests, and optimizers that need none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxnet import data, learning_rate, training

MAKERS = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
}
DEFAULTS = {"momentum": 0.01, "adam": 1e-3, "adamw": 1e-3}
# Octaves, so wide that no best rate lies at an end.
GRIDS = {
    "sgd": 2.0 ** np.arange(-9, 6),
    "momentum": 2.0 ** np.arange(-12, 3),
    "adam": 2.0 ** np.arange(-14, 0),
    "adamw": 2.0 ** np.arange(-14, 0),
}


def along_the_update(base, sigma=2.0, decay=0.9):
    """CDAT: η = σ (−g·u)/|u′Hu| along the base optimizer's update u, both averaged over batches; one product a step.

    Roulet et al., "Stepping on the Edge: Curvature Aware Learning Rate Tuners", NeurIPS 2024.
    """

    def init(params):
        return base.init(params), jnp.zeros(()), jnp.zeros(())

    def update(gradient, state, params=None, *, value_fn, **others):
        del others
        inner, falls, curves = state
        u, inner = base.update(gradient, inner, params)
        product = jax.jvp(jax.grad(value_fn), (params,), (u,))[1]
        falls = decay * falls - (1 - decay) * optax.tree.vdot(gradient, u)
        curves = decay * curves + (1 - decay) * jnp.abs(optax.tree.vdot(u, product))
        rate = sigma * jnp.maximum(falls, 0) / jnp.maximum(curves, jnp.finfo(curves.dtype).tiny)
        return optax.tree.scale(rate, u), (inner, falls, curves)

    return optax.GradientTransformationExtraArgs(init, update)


def _free(make):
    """A maker that has no use for a rate."""
    return lambda rate: make()


FREE = {
    "prodigy": _free(contrib.prodigy),
    "dadapt_adamw": _free(contrib.dadapt_adamw),
    "dowg": _free(contrib.dowg),
    "cocob": _free(contrib.cocob),
    "mechanize(adam)": _free(lambda: contrib.mechanize(optax.adam(1.0))),
    "momo_adam": _free(contrib.momo_adam),
    "schedule_free_adamw": _free(contrib.schedule_free_adamw),
    "CDAT(adam)": _free(lambda: along_the_update(optax.adam(1.0))),
    "CDAT(momentum)": _free(lambda: along_the_update(optax.sgd(1.0, momentum=0.9))),
}


@functools.cache
def linear(make, steps):
    """The maker with its rate falling to 0 in a straight line."""
    return lambda rate: make(optax.linear_schedule(rate, 0.0, steps))


def sweep(loss, params, train, held_out, make, rates, batch_size, num_epochs, key):
    """(R, epochs) held-out losses after each epoch; inf from where a run has diverged."""
    runs = training.sweep(
        loss, params, train, make, learning_rates=rates, batch_size=batch_size, num_epochs=num_epochs, key=key,
        validation=held_out,
    )  # fmt: skip
    curves = np.full((len(runs), num_epochs), np.inf)
    for curve, run in zip(curves, runs, strict=True):
        found = run.history.validation["loss"]
        curve[: len(found)] = np.where(np.isfinite(found), found, np.inf)
    return curves


def free(loss, params, train, held_out, name, batch_size, num_epochs, key):
    """(epochs,) held-out losses of an optimizer that needs no rate, on the batches that a sweep sees."""
    values = _free_run(loss, name, batch_size, num_epochs, params, train, held_out, key)
    return np.where(np.isfinite(values), values, np.inf)


@functools.partial(jax.jit, static_argnames=("loss", "name", "batch_size", "num_epochs"))
def _free_run(loss, name, batch_size, num_epochs, params, train, held_out, key):
    n = len(train[1])
    optimizer = FREE[name](None)
    update = training.make_update(loss, optimizer)
    step = lambda state, rows: update(state, jax.tree.map(lambda x: x[rows], train))
    evaluated = contrib.schedule_free_eval_params if name.startswith("schedule_free") else lambda _, params: params

    def epoch(state, number):
        order, whole = data.reshuffled(key, number, n), n // batch_size
        state, _ = training.trajectory(step, state, order[: whole * batch_size].reshape(whole, batch_size))
        if whole * batch_size < n:
            state, _ = step(state, order[whole * batch_size :])
        return state, loss(evaluated(state.opt_state, state.params), held_out)

    return training.trajectory(epoch, training.init_state(params, optimizer), jnp.arange(num_epochs))[1]


def read_off(loss, params, train, make, grid, batch_size, key, analysis):
    """The rates that a range test suggests: fastai's valley, Lightning's steepest slope."""
    rates = np.geomspace(grid[0], grid[-1], 100)
    found = learning_rate.range_test(
        loss, params, train, make, learning_rates=rates, batch_size=batch_size, key=key, analysis=analysis
    )
    return {"valley": float(found.valley), "steepest": float(found.steepest)}
