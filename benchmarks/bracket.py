"""The bracket of the limit for noisy batches: how far its ends are apart, and whether a population grows between them.

The population runs on the quadratic form of the Gauss–Newton matrices of single examples, by its gradients alone: where
a network begins its Hessians are indefinite, and along a negative curvature any rate grows.
"""

import jax
import jax.numpy as jnp

from benchmarks.contenders import MAKERS
from benchmarks.timing import Row
from benchmarks.workloads import SECOND_BATCH_SIZES, WORKLOADS
from jaxnet import curvature, learning_rate, losses

KEY = jax.random.key(0)
# Batches of these are followed on the smaller networks.
MEASURED = ("digits-relu", "digits-conv", "mnist1d-mlp", "mnist1d-residual", "wine-mlp")
SIZES = {1: 1024, 8: 64}  # B to the number of runs, which measure to about 2 %


def run():
    rows = []
    for name, workload in WORKLOADS.items():
        loss, params, train, _ = workload.start(KEY)
        sizes = sorted({workload.batch_size, SECOND_BATCH_SIZES.get(name, workload.batch_size)})
        for optimizer in ("sgd", "momentum", "adamw"):
            found = analysed(loss, params, train, MAKERS[optimizer], sizes)
            for size in sizes:
                low, high = map(float, found.bracket(size))
                rows.append(Row(f"{name}, {optimizer}, B = {size}: high / low", high / low, 2, False, {}))
        if name in MEASURED:
            rows += measured(name, loss, params, train)
        jax.clear_caches()
        print(name, flush=True)
    return rows


def analysed(loss, params, train, make, sizes):
    return learning_rate.analyse(
        loss, params, train, key=KEY, make_optimizer=make, batch_sizes=sizes, tol=0.01, num_probes=2
    )


def measured(name, loss, params, train):
    """The measured limit over each end, with the mean's own limit that of the Gauss–Newton matrix too."""
    found = analysed(loss, params, train, MAKERS["sgd"], list(SIZES))
    top = float(curvature.eigsh(curvature.gauss_newton(loss, params, train), key=KEY, tol=1e-2).values[0])
    exchange = float(found.derived.largest[0] - top) / 2
    rows = []
    for size, particles in SIZES.items():
        low, high = (1 / (1 / float(end) - exchange) for end in found.bracket(size))
        limit = learning_rate.measure_sgd_stability(
            quadratic(loss, params), jax.tree.map(jnp.zeros_like, params), train, size, highest=3 * high, key=KEY,
            replace=False, num_particles=particles, num_steps=200, num_repeats=1, num_halvings=8,
        ).limit  # fmt: skip
        rows.append(Row(f"{name}, B = {size}: measured limit / low", float(limit) / low, 0.98, True, {}))
        rows.append(Row(f"{name}, B = {size}: measured limit / high", float(limit) / high, 1.02, False, {}))
        rows.append(Row(f"{name}, B = {size}: high / low", high / low, 2, False, {}))
    return rows


def quadratic(loss, params):
    """½ δ′ (J_n′A_nJ_n) δ as a mean over examples."""
    parts = losses.parts_of(loss)[0]

    def value(delta, batch):
        network = lambda p: parts.outputs(p, batch)
        outputs, along = jax.jvp(network, (params,), (delta,))
        slope = jax.grad(lambda o: parts.criterion(o, batch[1]).sum())
        return jnp.sum(along * jax.jvp(slope, (outputs,), (along,))[1]) / (2 * len(batch[1]))

    return value
