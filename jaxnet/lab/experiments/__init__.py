"""One question a file, each answered by a `jaxnet.lab.record.Record`."""

from jaxnet.lab.experiments._registry import names, parts, question, run

__all__ = ["names", "parts", "question", "run"]


def __dir__() -> list[str]:
    return sorted(__all__)
