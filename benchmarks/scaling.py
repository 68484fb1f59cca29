"""Weak and strong scaling of a full-batch step and of λ_max over devices, and what each device counts and sends.

On a CPU two devices share its cores, so that times say little; counts of flops and bytes hold on any machine, and
docs/scaling.md projects from them.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.collectives import collectives
from benchmarks.timing import Row, side_by_side
from jaxnet import curvature, losses, nn, training

DEVICES, N = 2, 2048
# Of one device: sustained flop/s; between two: bytes/s, and seconds of a message, on one host and between hosts.
CHIP, LINKS = 4e14, {"8 on a host": (4.5e11, 5e-6), "64 over hosts": (5e10, 2e-5), "512 over hosts": (5e10, 2e-5)}


def problem(n, devices):
    mesh = jax.make_mesh((devices,), ("examples",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    model = nn.mlp([512, 512, 10], activation=jnp.tanh)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    params = model.init(jax.random.key(0), (784,))
    batch = (jax.random.normal(jax.random.key(1), (n, 784)), jnp.arange(n) % 10)
    put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
    return loss, put(params), put(batch, "examples")


def step_of(n, devices):
    """The compiled step, what it is called with, the flops of one device, and the bytes of all-reduces."""
    loss, params, batch = problem(n, devices)
    optimizer = optax.sgd(0.1)
    update = training.make_update(loss, optimizer)
    args = training.init_state(params, optimizer), batch
    compiled = jax.jit(update).lower(*args).compile()
    return lambda: compiled(*args), compiled.cost_analysis()["flops"], sum(collectives(update, *args)["all-reduce"])


def seconds(flops, sent, devices, link, latency):
    """Of a step: the flops of one device, then the all-reduce of the gradient: bytes by a ring, messages by a tree."""
    return flops / CHIP + 2 * (devices - 1) / devices * sent / link + 2 * math.log2(devices) * latency


def projected(flops, sent):
    """Efficiency, the share of a step that computes, and the flops a device at which it is one half."""
    for name, (link, latency) in LINKS.items():
        devices = int(name.split()[0])
        whole = seconds(flops, sent, devices, link, latency)
        yield name, flops / CHIP / whole, CHIP * (whole - flops / CHIP)


def run():
    jax.config.update("jax_num_cpu_devices", DEVICES)
    one, strong, weak = step_of(N, 1), step_of(N, DEVICES), step_of(DEVICES * N, DEVICES)
    times = side_by_side({"one": one[0], "strong": strong[0], "weak": weak[0]})
    rows = [
        Row("step, strong: time on 2 devices / on 1", times["strong"] / times["one"], 1.0, False, times),
        Row(
            "step, weak: time of twice the examples on 2 / of one on 1", times["weak"] / times["one"], 2.0, False, times
        ),
        Row("step, strong: flops a device on 2 / on 1", strong[1] / one[1], 0.51, False, {}),
        Row("step, weak: flops a device on 2 / on 1", weak[1] / one[1], 1.01, False, {}),
    ]
    loss, params, batch = problem(N, 1)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    rows.append(Row("step: bytes all-reduced / the gradient's", strong[2] / size, 1.001, False, {}))
    search = lambda devices: lambda: curvature.sharpness(*problem(N, devices), key=jax.random.key(2)).value
    searches = side_by_side({"one": search(1), "two": search(DEVICES)}, repeats=3)
    rows.append(Row("sharpness, strong: time on 2 / on 1", searches["two"] / searches["one"], 1.0, False, searches))
    for name, efficiency, flops in projected(one[1], strong[2]):
        what = f"projected, weak, {name}: share of a step that computes"
        rows.append(Row(what, efficiency, 0.5, True, {"flops a device for one half": flops}))
    return rows
