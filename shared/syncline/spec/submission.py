"""A run spec as it is submitted and stored, so that services of different minor versions can read it.

The record holds every setting with its value, and the names of those that the user did not write. So a default that changes
between two versions changes no run that was submitted before. A reader ignores a setting that it does not know and that the
user did not write, because its default means «as before»; it refuses one that the user wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from syncline.errors import ConfigError
from syncline.settings import parse
from syncline.spec.run_spec import RunSpec
from syncline.wire.messages import Submit, encode


def submission(spec: RunSpec, read_from: Submit | None = None) -> Submit:
    """Return the record of a spec.

    Args:
        spec: the run's settings.
        read_from: the record that `spec` was read from, where it is stored again: what was not written there still is not.

    Raises:
        ConfigError: the record is larger than a reader accepts.
    """
    settings = spec.model_dump(mode="json")
    written = spec.model_dump(mode="json", exclude_unset=True) if read_from is None else read_from.spec
    earlier = () if read_from is None else read_from.defaults
    record = Submit(spec=settings, defaults=sorted({*earlier, *_absent(settings, written)}))
    size = len(encode(record))
    if size > Submit.max_bytes:
        problem = f"the settings take {size} bytes, and a record holds {Submit.max_bytes}"
        raise ConfigError("spec", problem, "Keep data in files of their own, and name them in `task_options`")
    return record


def submitted_spec(record: Submit, model: type[RunSpec] = RunSpec) -> RunSpec:
    """Return the spec in a record. Raises ConfigError, also for a written setting that this version does not know."""
    return parse(model, record.spec, ignored=frozenset(record.defaults))


def _absent(settings: dict[str, Any], written: Any, prefix: str = "") -> Iterator[str]:
    """Names of settings that are not among the written ones, with their sections: `local.steps`."""
    for name, value in settings.items():
        if name not in written:
            yield f"{prefix}{name}"
        elif isinstance(value, dict) and isinstance(written[name], dict):
            yield from _absent(value, written[name], f"{prefix}{name}.")
