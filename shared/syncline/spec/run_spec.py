"""The settings of one run, as a user writes them in YAML, and the loader of such a file.

A setting that does not exist, is out of range or has no meaning beside another one is refused here, before anything starts.
The error names the setting, its value and a hint. The module imports no bus and no torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import model_validator

from syncline.errors import ConfigError
from syncline.settings import parse as parse  # re-exported: a RunSpec is built by parse(RunSpec, mapping)
from syncline.spec.guardrails import check_combinations, warnings_of
from syncline.spec.sections import SPEC_VERSION, RunSettings
from syncline.spec.yaml_file import read_yaml
from syncline.wire.subjects import checked_name

SIM_SECTION = "sim"  # a section of a spec's file that only the simulator reads


class RunSpec(RunSettings):
    """One training job. The same spec, seed and agents give the same model, bit for bit, in synchronous runs."""

    beside = (SIM_SECTION,)

    @model_validator(mode="before")
    @classmethod
    def _known_version(cls, data: Any) -> Any:
        version = data.get("v", SPEC_VERSION) if isinstance(data, dict) else SPEC_VERSION
        if not isinstance(version, int) or version < 1:
            raise ConfigError("v", f"{version!r} is not a spec version", f"Use {SPEC_VERSION}")
        if version > SPEC_VERSION:
            raise ConfigError(
                "v",
                f"the spec has version {version}, this Syncline reads up to {SPEC_VERSION}",
                "Upgrade Syncline here, or write the spec for the older version",
            )
        return data

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        checked_name("name", self.name)
        module, _, attribute = self.task.rpartition(":")
        if not module or not attribute.isidentifier():
            raise ConfigError(
                "task", f"{self.task!r} names no class", "Write `package.module:Class` or `file.py:Class`"
            )
        if self.agents.max is not None and self.agents.max < self.agents.min:
            raise ConfigError(
                "agents.max", f"{self.agents.max} is below agents.min = {self.agents.min}", "Raise it or leave it out"
            )
        check_combinations(self)
        return self

    @property
    def warnings(self) -> list[str]:
        """Warnings about settings that are valid but rarely intended, each with a hint."""
        return warnings_of(self)


def load_spec(path: Path, **overrides: Any) -> RunSpec:
    """Return the spec in a YAML file, without its section `sim`.

    Args:
        path: the file.
        overrides: top-level settings that replace those of the file.

    Raises:
        ConfigError: the file cannot be read, or a setting is wrong.
    """
    data = read_yaml(path)
    if isinstance(data, dict):
        data = {**{name: value for name, value in data.items() if name != SIM_SECTION}, **overrides}
    return parse(RunSpec, data)


def stem_of(path: Path) -> str:
    """Return a valid name of a run made from the name of a file."""
    return re.sub(r"[^a-z0-9-]+", "-", path.stem.lower()).strip("-")[:50] or "run"
