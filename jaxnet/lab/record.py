"""What an experiment leaves behind: numbers, claims with their verdicts, and panels that say what to draw.

Plain data without any computation, so that it goes to JSON as it stands.
"""

import dataclasses
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve of a panel.

    Attributes:
      label: its name in the legend.
      x: abscissae.
      y: ordinates, of the same length.
      style: "line", "dashed", "points", "line-points" or "bars".
      colour: series and lines of one number share a colour; by default each has the next.
    """

    label: str
    x: Any
    y: Any
    style: str = "line"
    colour: int | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """A vertical (``axis="x"``) or horizontal (``axis="y"``) line at a value that means something."""

    label: str
    value: float
    axis: str = "x"
    colour: int | None = None


@dataclasses.dataclass(frozen=True)
class Contours:
    """Level lines of z (len(y), len(x)) under a panel's curves."""

    x: Any
    y: Any
    z: Any
    label: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """One figure: what is drawn, against what, on which scales: linear, log, or log2 for batch sizes and the like."""

    name: str
    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series] = ()
    lines: Sequence[Line] = ()
    contours: Contours | None = None
    xscale: str = "linear"
    yscale: str = "linear"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A prediction held against a measurement.

    Attributes:
      key: what to find it by, in snake_case; no other claim of its record has it.
      name: what is claimed, in words.
      predicted: the theory's figure.
      measured: the experiment's.
      passed: whether they agree within ``tolerance``.
      tolerance: the bound, in words.
    """

    key: str
    name: str
    predicted: float
    measured: float
    passed: bool
    tolerance: str


def slug(*parts: Any) -> str:
    """A claim's key from a loop's items: ``slug("limit", "heavy ball", 0.1)`` is limit_heavy_ball_0_1."""
    return "_".join(re.findall("[a-z0-9]+", " ".join(map(str, parts)).lower()))


def within(key: str, name: str, predicted: Any, measured: Any, relative: float) -> Claim:
    """The claim that ``measured`` is within a relative distance of ``predicted``; NaN never is."""
    p, m = float(predicted), float(measured)
    return Claim(key, name, p, m, abs(m - p) <= relative * abs(p), f"within {relative:.2g} of it, relative")


def close(key: str, name: str, predicted: Any, measured: Any, absolute: float) -> Claim:
    """The claim that ``measured`` is within an absolute distance of ``predicted``; NaN never is."""
    p, m = float(predicted), float(measured)
    return Claim(key, name, p, m, abs(m - p) <= absolute, f"within {absolute:.2g} of it")


def below(key: str, name: str, bound: Any, measured: Any) -> Claim:
    """The claim that ``measured`` is below ``bound``."""
    return Claim(key, name, float(bound), float(measured), float(measured) < float(bound), "below it")


def above(key: str, name: str, bound: Any, measured: Any) -> Claim:
    """The claim that ``measured`` is above ``bound``."""
    return Claim(key, name, float(bound), float(measured), float(measured) > float(bound), "above it")


def versions() -> dict[str, str]:
    """Python and the packages whose versions can change a number."""
    names = ("jaxnet", "jax", "jaxlib", "optax", "chex", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything that an experiment found.

    Attributes:
      name: the experiment.
      question: what it asks, in a sentence.
      config: its options.
      seed: of its randomness.
      dtype: of its arithmetic.
      measurements: name -> number, array or mapping of them.
      claims: predictions held against measurements, each with a key of its own.
      panels: what to draw.
      rows: the lines of its table, (quantity, value, remark).
      versions: of Python and the packages.
      answer: what a person takes away, in sentences; told first.

    Raises:
      ValueError: two claims have the same key.
    """

    name: str
    question: str
    config: Mapping[str, Any]
    seed: int
    dtype: str
    measurements: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    claims: Sequence[Claim] = ()
    panels: Sequence[Panel] = ()
    rows: Sequence[tuple[str, Any, str]] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)
    answer: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse claims of the same key."""
        keys = [claim.key for claim in self.claims]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"claims of {self.name}: expected different keys, got more than one {', '.join(twice)}")

    @property
    def passed(self) -> bool:
        """Whether every claim held."""
        return all(claim.passed for claim in self.claims)

    def claim(self, key: str) -> Claim:
        """The claim with this key.

        Raises:
          ValueError: there is none; the message lists the known keys.
        """
        by_key = {claim.key: claim for claim in self.claims}
        if key not in by_key:
            raise ValueError(f"unknown claim of {self.name} {key!r}: known are {', '.join(by_key)}")
        return by_key[key]

    def to_json(self) -> str:
        """Strict JSON; NaN and infinities become the strings "nan", "inf" and "-inf"."""
        return to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """The record that `to_json` wrote, its arrays as lists.

        Raises:
          ValueError: ``text`` is not of a record.
        """
        try:
            fields = _numbers(json.loads(text))
            panels = [
                Panel(
                    **panel
                    | {
                        "series": [Series(**series) for series in panel["series"]],
                        "lines": [Line(**line) for line in panel["lines"]],
                        "contours": panel["contours"] and Contours(**panel["contours"]),
                    }
                )
                for panel in fields["panels"]
            ]
            claims = [Claim(**claim) for claim in fields["claims"]]
            return cls(**fields | {"panels": panels, "claims": claims, "rows": [tuple(row) for row in fields["rows"]]})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a record in JSON, got something else ({error!r})") from error


def to_json(value: Any) -> str:
    """Mappings, sequences, arrays and numbers as strict JSON, with "nan", "inf" and "-inf" as strings."""
    return json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False)


def _numbers(value: Any) -> Any:
    """Of what JSON gave: the words for what it has no number for, as numbers."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    return str(value)
