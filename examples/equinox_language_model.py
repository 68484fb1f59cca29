"""A language model in Equinox, trained by AdamW behind a clip and a schedule, at a rate that is derived.

Run it: python examples/equinox_language_model.py
"""

from pydoc_data import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import learning_rate, losses, training

WINDOW, FEATURES, BATCH_SIZE, NUM_EPOCHS = 24, 32, 32, 4
key = jax.random.key(0)

text = "".join(topics.topics.values())[:60_000]
alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
codes = np.array([alphabet[character] for character in text])
windows = codes[: len(codes) // (WINDOW + 1) * (WINDOW + 1)].reshape(-1, WINDOW + 1)
windows = np.random.default_rng(0).permutation(windows)
inputs, targets = jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, 1:])
train, held_out = (inputs[:2000], targets[:2000]), (inputs[2000:], targets[2000:])


class Model(eqx.Module):
    """One block of attention over what came before; nothing here knows of jaxnet."""

    embed: eqx.nn.Embedding
    place: jax.Array
    norms: list[eqx.nn.LayerNorm]
    attend: eqx.nn.MultiheadAttention
    rework: eqx.nn.MLP
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.embed = eqx.nn.Embedding(len(alphabet), FEATURES, key=keys[0])
        self.place = jax.random.normal(keys[1], (WINDOW, FEATURES))
        self.norms = [eqx.nn.LayerNorm(FEATURES) for _ in range(3)]
        self.attend = eqx.nn.MultiheadAttention(4, FEATURES, key=keys[2])
        self.rework = eqx.nn.MLP(FEATURES, FEATURES, 4 * FEATURES, 1, jax.nn.gelu, key=keys[3])
        self.out = eqx.nn.Linear(FEATURES, len(alphabet), key=keys[4])

    def __call__(self, tokens):
        """(T,) tokens to (T, V) logits."""
        first, second, last = (jax.vmap(norm) for norm in self.norms)
        h = jax.vmap(self.embed)(tokens) + self.place
        before = jnp.tril(jnp.ones((WINDOW, WINDOW), bool))
        h = h + self.attend(first(h), first(h), first(h), mask=before)
        h = h + jax.vmap(self.rework)(second(h))
        return jax.vmap(self.out)(last(h))


# The one contract, loss(params, batch) -> scalar: the arrays are the params, and the rest is put back in use. Network
# and criterion are kept apart, for Gauss–Newton matrices; any function of params and batch would do as well.
params, rest = eqx.partition(Model(key), eqx.is_inexact_array)
network = lambda params, tokens: jax.vmap(eqx.combine(params, rest))(tokens)
loss = losses.mean_loss(network, losses.softmax_cross_entropy)

num_steps = NUM_EPOCHS * -(-len(train[1]) // BATCH_SIZE)


def make_optimizer(rate):
    """The rate is the schedule's peak; the clip is told apart from it."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(rate, num_steps), weight_decay=0.01),
    )


found = learning_rate.analyse(
    loss, params, train, key=key, make_optimizer=make_optimizer, batch_sizes=[BATCH_SIZE], tol=1e-2, num_probes=4
)
print(found.reason(BATCH_SIZE))
print(f"decided for the price of {float(found.derived.num_gradients[0]):.3g} gradients of all examples")

for name, rate in (("derived", found.rate(BATCH_SIZE)), ("usual", 1e-3)):
    result = training.fit(
        loss, params, train, make_optimizer, learning_rate=rate, batch_size=BATCH_SIZE, num_epochs=NUM_EPOCHS, key=key,
        validation=held_out,
    )  # fmt: skip
    before, after = float(loss(params, held_out)), result.history.validation["loss"][-1]
    print(f"held-out loss at the {name} rate, {float(rate):.3g}: {before:.4g} to {after:.4g}")
