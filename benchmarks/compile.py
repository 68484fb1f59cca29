"""What a first call costs: compilation, in units of the first gradient's on the same network.

N is 16, so that execution is nothing. Every first call starts with empty caches; CPU time, since XLA compiles on
several threads. Programs are counted by JAX's own event, traces by a counter within the network.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import Row
from jaxnet import curvature, learning_rate, losses, nn, per_example

N, REPEATS = 16, 3
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
WIDTH, VOCABULARY, LENGTH = 32, 64, 16
COUNTS = {"programs": 0, "traces": 0}


def transformer(layers):
    network = nn.transformer(
        VOCABULARY, features=WIDTH, num_heads=2, num_layers=layers, hidden=4 * WIDTH, max_length=LENGTH
    )
    x = jax.random.randint(jax.random.key(1), (N, LENGTH), 0, VOCABULARY)
    return network, (x, jnp.roll(x, -1, axis=1))


def lenet():
    x = jax.random.normal(jax.random.key(1), (N, 28, 28, 1))
    return nn.lenet(10), (x, jnp.arange(N) % 10)


def resnet():
    relu = nn.activation(jax.nn.relu)
    norm = functools.partial(nn.group_norm, 4)
    block = lambda: nn.residual(nn.serial(nn.conv(16, (3, 3)), norm(), relu, nn.conv(16, (3, 3)), norm()))
    layers = [nn.conv(16, (3, 3)), norm(), relu]
    for _ in range(3):
        layers += [block(), relu]
    network = nn.serial(*layers, nn.avg_pool((4, 4)), nn.flatten(), nn.dense(10))
    x = jax.random.normal(jax.random.key(1), (N, 16, 16, 3))
    return network, (x, jnp.arange(N) % 10)


def scanned(layers):
    """Blocks in one `lax.scan` over their stacked params: a program of one size, however many there are."""

    def init(key, input_shape):
        first, second = jax.random.normal(key, (2, layers, WIDTH, WIDTH)) / WIDTH**0.5
        return {"first": first, "second": second, "scale": jnp.ones((layers, WIDTH))}

    def apply(params, x):
        block = lambda x, p: (x + p["scale"] * (jnp.tanh(x @ p["first"]) @ p["second"]), None)
        return jax.lax.scan(block, x, params)[0]

    return nn.Layer(init, apply), (jax.random.normal(jax.random.key(1), (N, WIDTH)), jnp.arange(N) % WIDTH)


NETWORKS = {
    "transformer, 2 layers": lambda: transformer(2),
    "transformer, 4 layers": lambda: transformer(4),
    "transformer, 8 layers": lambda: transformer(8),
    "LeNet": lenet,
    "residual, group norm": resnet,
    "scan over 2 layers": lambda: scanned(2),
    "scan over 8 layers": lambda: scanned(8),
}
# Of the multiple of the gradient's, from 2 scanned layers to 8.
GROWTH = 1.1


def counted(apply):
    """The network, counting its traces; a new function at each call, so that nothing of it is compiled yet."""

    def traced(params, x):
        COUNTS["traces"] += 1
        return apply(params, x)

    return traced


def analyse(loss, params, batch, key, *, make_optimizer=optax.sgd):
    return learning_rate.analyse(loss, params, batch, key=key, make_optimizer=make_optimizer)


def hessian(loss, params, batch):
    return curvature.hessian(loss, params, batch)


CALLS = {
    "gradient": (lambda loss, params, batch, key: jax.jit(jax.grad(loss))(params, batch), 1.0),
    "one product": (lambda loss, params, batch, key: _product(loss, params, batch), 2.5),
    "sharpness": (lambda *given, key: curvature.sharpness(*given, key=key), 3.5),
    "eigsh, k = 5": (lambda *given, key: curvature.eigsh(hessian(*given), 5, key=key), 4),
    "spectral_density": (lambda *given, key: curvature.spectral_density(hessian(*given), key=key), 4),
    "tracker.init": (lambda loss, params, batch, key: curvature.track(loss, batch, key=key).init(params), 4),
    "per-example norms": (lambda *given, key: per_example.gradients(*given).norms(), 2.5),
    "variance": (lambda *given, key: per_example.gradients(*given).variance(), 2.5),
    "weighted sum": (lambda *given, key: per_example.gradients(*given).weighted_sum(jnp.ones(N)), 2.5),
    "analyse": (analyse, 10),
    "analyse, AdamW": (functools.partial(analyse, make_optimizer=optax.adamw), 10),
}


@jax.jit(static_argnums=0)
def _product(loss, params, batch):
    return hessian(loss, params, batch) @ params


def measure(call, network, batch):
    """CPU seconds, programs and traces of the first call, and of a second one with new values."""
    key = jax.random.key(0)
    params, again = (network.init(k, batch[0].shape[1:]) for k in jax.random.split(key))
    loss = losses.mean_loss(counted(network.apply), losses.softmax_cross_entropy)
    found = []
    jax.clear_caches()
    for values in (params, again):
        COUNTS.update(programs=0, traces=0)
        start = time.process_time()
        jax.block_until_ready(jax.tree.leaves(call(loss, values, batch, key=key)))
        found.append({"seconds": time.process_time() - start, **COUNTS})
    return found


@functools.cache
def listen():
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: COUNTS.update(programs=COUNTS["programs"] + (event == BACKEND_COMPILE))
    )


def run(only=None, networks=None):
    listen()
    rows, multiples = [], {}
    for name, make in NETWORKS.items():
        if networks and name not in networks:
            continue
        # Beside a gradient that compiles in no time anything is a large multiple: there the growth alone is asked.
        scan = name.startswith("scan")
        network, batch = make()
        measure(CALLS["gradient"][0], network, batch)
        chosen = {
            what: call
            for what, call in CALLS.items()
            if what == "gradient" or (what == "sharpness" if scan else only is None or what in only)
        }
        found = {what: [measure(call, network, batch) for _ in range(REPEATS)] for what, (call, _) in chosen.items()}
        seconds = {what: statistics.median(first["seconds"] for first, _ in runs) for what, runs in found.items()}
        if scan:
            multiples[name] = seconds["sharpness"] / seconds["gradient"]
            continue
        for what, (_, bound) in chosen.items():
            if what != "gradient":
                counts = "; then ".join(f"{c['programs']} programs, {c['traces']} traces" for c in found[what][0])
                rows.append(
                    Row(f"{name}: {what} ({counts})", seconds[what] / seconds["gradient"], bound, False,
                        {"gradient": seconds["gradient"], what: seconds[what]})
                )  # fmt: skip
                print(rows[-1], flush=True)
    if len(multiples) == 2:
        few, many = multiples.values()
        rows.append(
            Row("sharpness of 8 scanned layers against 2, in their gradients", many / few, GROWTH, False, multiples)
        )
    return rows
