"""A network that is too large, trained for too long, on too few examples."""

import jax
import jax.numpy as jnp
import optax

from jaxnet import data, learning_rate, losses, nn, training
from jaxnet.lab._progress import Share, unseen, watched
from jaxnet.lab.record import Line, Panel, Record, Series, above, below, close

QUESTION = "Does a too large network, trained for too long, learn its examples at the cost of others?"


def run(*, seed: int = 0, num_train: int = 100, num_epochs: int = 1500, share: Share = unseen) -> Record:
    """On 100 digits the training loss vanishes and the held-out loss turns up; early stopping takes its minimum."""
    inputs, labels = data.digits()
    if not 20 <= num_train <= len(labels) - 200:
        raise ValueError(f"num_train: expected 20 to {len(labels) - 200}, got {num_train}")
    train, held_out, test = (
        (inputs[:num_train], labels[:num_train]),
        (inputs[num_train:], labels[num_train:]),
        data.digits("test"),
    )
    model = nn.mlp([256, 256, 10], activation=jnp.tanh)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    init_key, analysis_key, key = jax.random.split(jax.random.key(seed), 3)
    params = model.init(init_key, inputs.shape[1:])
    rate = float(learning_rate.analyse(loss, params, train, key=analysis_key).rate(None))
    share(0.4)

    def fit(stop: training.StopRule | None) -> training.FitResult:
        return training.fit(
            loss, params, train, optax.sgd, learning_rate=rate, batch_size=None, num_epochs=num_epochs, key=key,
            validation=held_out, stop=stop, metrics={"loss": loss},
        )  # fmt: skip

    long, early = (fit(stop) for stop in watched((None, training.StopRule(patience=100)), share, 0.4))
    assert long.best is not None
    assert early.best is not None
    history = long.history
    held_losses, train_losses = history.validation["loss"], history.metrics["loss"]
    test_at = lambda p: float(loss(p, test))
    claims = [
        below("training_loss", "training loss at the end", 1e-3, train_losses[-1]),
        above("held_out_rise", "held-out loss at the end, over its minimum", 1.1, held_losses[-1] / held_losses.min()),
        close(
            "early_stop_keeps_minimum",
            "early stopping keeps the minimum of the held-out loss",
            held_losses.min(),
            early.best.loss,
            1e-6,
        ),
        below(
            "early_stop_epoch", "early stopping ends before the long run: its epochs", num_epochs, early.stopped.epoch
        ),
        below(
            "early_stop_test_loss",
            "test loss of what it keeps, against the end's",
            test_at(long.state.params),
            test_at(early.best.params),
        ),
    ]
    return Record(
        name="overfitting",
        question=QUESTION,
        config={"num_train": num_train, "num_epochs": num_epochs},
        seed=seed,
        dtype="float32",
        measurements={
            "rate": rate,
            "best_epoch": early.best.epoch,
            "stopped": str(early.stopped),
            "train_loss": train_losses,
            "held_out_loss": held_losses,
            "test_loss_early": test_at(early.best.params),
            "test_loss_end": test_at(long.state.params),
        },
        claims=claims,
        panels=[
            Panel(
                name="losses",
                title=f"{num_train} digits and a network of 85 002 parameters, at η = {rate:.2g}",
                xlabel="epoch",
                ylabel="mean loss",
                series=[
                    Series("training", history.epoch, train_losses),
                    Series("held out", history.epoch, held_losses),
                ],
                lines=[Line(f"early stopping: epoch {early.best.epoch}", float(early.best.epoch))],
                xscale="log",
                yscale="log",
            )
        ],
    )
