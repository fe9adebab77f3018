"""The base of all settings, and what is said of one that is wrong: setting, value, mend. Knows none in particular."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from syncline.errors import ConfigError


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    beside: ClassVar[
        tuple[str, ...]
    ] = ()  # sections that stand beside these settings in a file, and are read elsewhere


def default_kind(kind: str) -> BeforeValidator:
    """For a section of several kinds: the one that is meant where none is named."""
    return BeforeValidator(lambda value: {"kind": kind, **value} if isinstance(value, dict) else value)


S = TypeVar("S", bound=Settings)


def parse(model: type[S], data: Any, section: str = "") -> S:
    """Validated settings, or one ConfigError that lists everything wrong. `section`: where in the spec they stand."""
    if not isinstance(data, dict):
        mend = f"Write settings under `{section}:`" if section else "Start with a line like `task: …`"
        raise ConfigError(section or "spec", f"is a {type(data).__name__}, not a mapping", mend)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, item, section) for item in error.errors()]
        first = problems[0]
        rest = "".join(f"\n{p}" for p in problems[1:])
        raise ConfigError(first.setting, first.problem, first.mend + rest) from None


def _explain(model: type[Settings], item: Any, section: str) -> ConfigError:
    """Pydantic's finding in the words of the user: setting, value, mend."""
    kind, value, loc = item["type"], item.get("input"), [str(p) for p in item["loc"]]
    own = len(loc) - (kind == "extra_forbidden")  # the last name is the user's then, and may read like a tag
    tags = _tags(model)
    path = [p for i, p in enumerate(loc) if i >= own or p not in tags]
    setting = ".".join([section, *path] if section else path) or "spec"
    if kind == "extra_forbidden":
        known = _settings_at(model, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        mend = f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(known)}"
        return ConfigError(setting, "there is no such setting", mend)
    if kind == "missing":
        return ConfigError(setting, "is missing", "Add it")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        problem = "is missing" if kind == "union_tag_not_found" else f"{value.get('kind')!r} is not accepted"
        return ConfigError(f"{setting}.kind", problem, f"Use one of {', '.join(_kinds_at(model, path))}")
    if kind == "value_error":
        return ConfigError(setting, str(item["ctx"]["error"]), "")
    message = item["msg"][:1].lower() + item["msg"][1:]
    return ConfigError(setting, f"{value!r} is not accepted", message[:1].upper() + message[1:])


def _tags(model: type[BaseModel]) -> set[str]:
    """What pydantic puts into a setting's path beside the names of settings: the kinds of sections, and words of its own."""
    found = {"function-before", "function-after", "literal['all']", "constrained-int"}
    for field in model.model_fields.values():
        for section in _models_in(field.annotation):
            kind = section.model_fields.get("kind")
            found |= set(get_args(kind.annotation)) if kind is not None else set()
            found |= _tags(section)
    return found


def _settings_at(model: type[Settings], path: list[str]) -> list[str]:
    """The names of the settings of a section, for «did you mean»."""
    beside = () if path else model.beside
    return sorted({*beside, *(name for section in _sections_at(model, path) for name in section.model_fields)})


def _kinds_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The values of `kind` that a section can have."""
    return [kind for section in _sections_at(model, path) for kind in get_args(section.model_fields["kind"].annotation)]


def _sections_at(model: type[BaseModel], path: list[str]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = [model]
    for name in (p for p in path if not p.isdigit()):  # places in a list
        found = [m for section in found if (f := section.model_fields.get(name)) for m in _models_in(f.annotation)]
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]
