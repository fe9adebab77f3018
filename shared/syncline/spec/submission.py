"""The record of a run spec that is submitted and stored. Services of different minor versions can read it.

The record holds the values of all settings, and the names of those that the user did not write. A default that changes between
two versions therefore changes no run that was submitted before. A reader ignores an unknown setting that the user did not
write, because the default of a new setting keeps the previous behaviour; it refuses an unknown setting that the user wrote.
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
        read_from: the record from which `spec` was read, if it is stored again: settings that are defaults there stay so, and
            settings that this version ignored are kept for readers that know them.

    Raises:
        ConfigError: the record is larger than a reader accepts.
    """
    settings = spec.model_dump(mode="json")
    written = spec.model_dump(mode="json", exclude_unset=True) if read_from is None else read_from.spec
    earlier = () if read_from is None else read_from.defaults
    for name in earlier:
        _keep(name.split("."), settings, written)
    record = Submit(spec=settings, defaults=sorted({*earlier, *_absent(settings, written)}))
    size = len(encode(record))
    if size > Submit.max_bytes:
        problem = f"the settings take {size} bytes, and a record holds {Submit.max_bytes}"
        raise ConfigError("spec", problem, "Keep data in files of their own, and name them in `task_options`")
    return record


def submitted_spec(record: Submit, model: type[RunSpec] = RunSpec) -> RunSpec:
    """Return the spec in a record.

    Raises:
        ConfigError: a setting is wrong, or the user wrote a setting that this version does not know.
    """
    return parse(model, record.spec, ignored=frozenset(record.defaults))


def _keep(path: list[str], settings: Any, written: Any) -> None:
    """Copy the value at a path of nested mappings, where there is one and `settings` has none."""
    for section in path[:-1]:
        settings, written = (
            mapping.get(section) if isinstance(mapping, dict) else None for mapping in (settings, written)
        )
    if isinstance(settings, dict) and isinstance(written, dict) and path[-1] in written:
        settings.setdefault(path[-1], written[path[-1]])


def _absent(settings: dict[str, Any], written: Any, prefix: str = "") -> Iterator[str]:
    """Yield the settings that the user did not write, with their sections, as `local.steps`."""
    for name, value in settings.items():
        if name not in written:
            yield f"{prefix}{name}"
        elif isinstance(value, dict) and isinstance(written[name], dict):
            yield from _absent(value, written[name], f"{prefix}{name}.")
