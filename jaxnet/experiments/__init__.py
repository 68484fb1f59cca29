"""One question a file, each answered by a `jaxnet.record.Record`."""

from jaxnet.experiments.registry import names, question, run

__all__ = ["names", "question", "run"]
