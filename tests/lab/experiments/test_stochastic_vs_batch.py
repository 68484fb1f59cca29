import dataclasses

import numpy as np
import pytest

from jaxnet.lab import experiments
from jaxnet.lab.experiments import stochastic_vs_batch
from jaxnet.lab.record import Record, below


def test_every_line_is_measured_or_has_its_source(monkeypatch):
    """With experiments that claim each of the wanted keys once, and miss."""
    lines = [line for line in stochastic_vs_batch.TABLE if isinstance(line, stochastic_vs_batch.Measured)]

    def fake(module):
        claims = [below(key, "", 1, 2) for line in lines if line.experiment is module for key in line.keys]
        return lambda seed, **options: Record(module.__name__, "", {}, seed, "float64", claims=claims, panels=[None])

    for module in stochastic_vs_batch.MEASURED:
        monkeypatch.setattr(module, "run", fake(module))
    done = []
    found = experiments.run("stochastic_vs_batch", share=done.append)
    np.testing.assert_allclose(done, np.arange(6) / 6)
    assert len(found.rows) == len(stochastic_vs_batch.TABLE)
    assert len(found.claims) == sum(len(line.keys) for line in lines)
    assert not found.passed
    assert sum(value == "proven" for _, value, _ in found.rows) == len(found.rows) - len(lines)


def test_a_line_without_a_claim_is_an_error(monkeypatch):
    table = [line._replace(keys=("no_such_claim",)) for line in stochastic_vs_batch.TABLE[:1]]
    monkeypatch.setattr(stochastic_vs_batch, "TABLE", table)
    monkeypatch.setattr(stochastic_vs_batch, "MEASURED", {table[0].experiment: {}})
    empty = Record("redundancy", "", {}, 0, "float64")
    monkeypatch.setattr(table[0].experiment, "run", lambda seed: dataclasses.replace(empty, seed=seed))
    with pytest.raises(ValueError, match="unknown claim of redundancy 'no_such_claim'"):
        stochastic_vs_batch.run()
