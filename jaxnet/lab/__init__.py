"""The laboratory: an application on top of the library, with experiments, records, tables, figures, a command line."""

from jaxnet.lab import experiments, plots, record, report

__all__ = ["experiments", "plots", "record", "report"]


def __dir__() -> list[str]:
    return sorted(__all__)
