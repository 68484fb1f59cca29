"""From a table of your own to a derived learning rate and a trained network.

    python examples/your_csv.py table.csv            # the last column is what to predict
    python examples/your_csv.py table.csv price      # or the column of this name
    python examples/your_csv.py table.csv age number # whole numbers that are a quantity, where they would be classes

The table needs a header line. Without a path the script writes a real one, scikit-learn's wines.
"""

import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import data, learning_rate, losses, nn, training

path, target, kind = [*sys.argv[1:], None, None, None][:3]
if path is None:
    from sklearn.datasets import load_wine

    wine = load_wine()
    path = pathlib.Path(tempfile.mkdtemp()) / "wine.csv"
    header = ",".join([*wine.feature_names, "class"])
    np.savetxt(path, np.column_stack([wine.data, wine.target]), "%.10g", ",", header=header, comments="")

# Shuffle; a fifth of the rows tells when to stop, a fifth tests. The others give each input mean 0 and spread 1.
keys = jax.random.split(jax.random.key(0), 4)
inputs, targets = data.load(path, target=target)
fifth = len(inputs) // 5
held_out, test, train = jnp.split(jax.random.permutation(keys[0], len(inputs)), [fifth, 2 * fifth])
scaled = lambda x: (x - x[train].mean(axis=0)) / jnp.maximum(x[train].std(axis=0), 1e-6)
inputs = scaled(inputs)

# Words and whole numbers are classes, unless they are called a number; any other target is a quantity.
labelled = jnp.issubdtype(targets.dtype, jnp.integer) and kind != "number"
if labelled:
    classes, targets = jnp.unique(targets, return_inverse=True)
    num_classes = len(classes)
    model, criterion = nn.mlp([32, num_classes]), losses.softmax_cross_entropy
else:
    model, criterion = nn.mlp([32, 1]), losses.squared_error
    targets = scaled(targets.astype(float))[:, None]
kind = f"{num_classes} classes" if labelled else "a quantity"
print(f"{path}: {inputs.shape[1]} inputs, {kind} to predict; {len(train)} rows to train on\n")

# The learning rate, from the loss's curvature and its gradient's noise at the start.
loss = losses.mean_loss(model.apply, criterion)
params = model.init(keys[1], inputs.shape[1:])
parts = {name: (inputs[rows], targets[rows]) for name, rows in (("train", train), ("stop", held_out), ("test", test))}
found = learning_rate.analyse(loss, params, parts["train"], key=keys[2])
batch_size = min(32, len(train))
rate = float(found.rate(batch_size))
print(found)
print(f"\nlearning rate: {rate:.6g} for batches of {batch_size}, {float(found.optimal):.6g} for the full batch")

# Train at it, until the loss on the rows held out no longer falls.
result = training.fit(
    loss, params, parts["train"], optax.sgd, learning_rate=rate, batch_size=batch_size, num_epochs=200, key=keys[3],
    validation=parts["stop"], stop=training.StopRule(patience=20),
)  # fmt: skip
best = result.best.params
for name in ("train", "test"):
    before, after = (float(loss(p, parts[name])) for p in (params, best))
    print(f"loss on the {name} rows: {before:.4g} to {after:.4g}")
print(f"best after epoch {result.best.epoch}; {result.stopped}")
if labelled:
    print(f"right on the test rows: {losses.accuracy(model.apply, best, parts['test']):.1%}")
else:
    explained = 1 - 2 * loss(best, parts["test"]) / jnp.var(parts["test"][1])
    print(f"variance explained on the test rows: {explained:.1%}")
