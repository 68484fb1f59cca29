"""Going on with a job that was broken off: is it the same one?"""

import dataclasses
import json
from collections.abc import Collection
from typing import Any

from jaxnet.contract import UserError
from jaxnet.lab import record
from jaxnet.lab._task import Task
from jaxnet.lab.record import Record


def as_read(found: Record) -> Record:
    """A record as JSON has it: what follows sees the same whether or not the job was broken off in between."""
    return Record.from_json(found.to_json())


def check_same_job(begun: Record, name: str, config: Any, task: Task, free: Collection[str] = ()) -> None:
    """Raise a `UserError` unless a record that was begun is this job's.

    Args:
      begun: the record.
      name: of the job.
      config: its options now.
      task: what they make.
      free: options that may be other than they were.
    """
    anew = "; start anew with --overwrite"
    if begun.name != name:
        raise UserError(f"resume: the record there is of {begun.name}{anew}")
    plain = lambda value: json.loads(record.to_json(value))
    for kind, then, now in (
        ("--", plain(begun.config), plain(dataclasses.asdict(config))),
        ("", begun.versions, record.versions()),
        ("", {"data": begun.measurements.get("data")}, {"data": task.digest}),
    ):
        for key in now:
            if key not in free and then.get(key) != now[key]:
                option = f"{kind}{key.replace('_', '-')}" if kind else key
                raise UserError(f"resume: the job was begun with {option} {then.get(key)}, now {now[key]}{anew}")
