import dataclasses

import pytest

from jaxnet.lab.experiments import stochastic_vs_batch
from jaxnet.lab.record import Record, below


def test_every_line_is_measured_or_has_its_source(monkeypatch):
    """With experiments that claim each of the wanted beginnings once, and one that misses."""
    lines = [line for line in stochastic_vs_batch.TABLE if isinstance(line, stochastic_vs_batch.Measured)]

    def fake(module):
        claims = [below(line.beginning + "x", 1, 2) for line in lines if line.experiment is module]
        return lambda seed, **options: Record(module.__name__, "", {}, seed, "float64", claims=claims, panels=[None])

    for module in stochastic_vs_batch.MEASURED:
        monkeypatch.setattr(module, "run", fake(module))
    found = stochastic_vs_batch.run(seed=0)
    assert len(found.rows) == len(stochastic_vs_batch.TABLE)
    assert len(found.claims) == len(lines)
    assert not found.passed
    assert sum(value == "proven" for _, value, _ in found.rows) == len(found.rows) - len(lines)


def test_a_line_without_a_claim_is_an_error(monkeypatch):
    table = [line._replace(beginning="no such claim") for line in stochastic_vs_batch.TABLE[:1]]
    monkeypatch.setattr(stochastic_vs_batch, "TABLE", table)
    monkeypatch.setattr(stochastic_vs_batch, "MEASURED", {table[0].experiment: {}})
    empty = Record("redundancy", "", {}, 0, "float64")
    monkeypatch.setattr(table[0].experiment, "run", lambda seed: dataclasses.replace(empty, seed=seed))
    with pytest.raises(LookupError, match="claims nothing that begins with 'no such claim'"):
        stochastic_vs_batch.run()
