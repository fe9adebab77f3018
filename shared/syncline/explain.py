"""What is wrong with a user's settings, in the user's words: setting, value and mend, out of pydantic's findings."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel

from syncline.errors import ConfigError

Models = list[type[BaseModel]]


def explain(model: type[BaseModel], item: Any, section: str = "", beside: tuple[str, ...] = ()) -> ConfigError:
    """One of pydantic's findings about `model`. `section`: where it stands in the spec; `beside`: what else may stand there."""
    kind, value, loc = item["type"], item.get("input"), [str(part) for part in item["loc"]]
    path, sections = _walk(model, loc[:-1] if kind == "extra_forbidden" else loc)
    if kind == "extra_forbidden":
        error = _unknown(model, path, loc[-1], sections, () if path else beside)
        return ConfigError(".".join(filter(None, (section, error.setting))), error.problem, error.mend)
    setting = ".".join(filter(None, (section, *path))) or "spec"
    if kind == "missing":
        return ConfigError(setting, "is missing", "Add it")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = item["ctx"]["discriminator"].strip("'")
        problem = "is missing" if kind == "union_tag_not_found" else f"{value.get(tag)!r} is not accepted"
        return ConfigError(f"{setting}.{tag}", problem, f"Use one of {', '.join(_tags(sections, tag))}")
    if kind == "value_error":
        return ConfigError(setting, str(item["ctx"]["error"]), "")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        known = ", ".join(sorted({field for section in sections for field in section.model_fields}))
        return ConfigError(setting, f"{value!r} is not accepted", f"Write settings under it{known and ': '}{known}")
    message = item["msg"][:1].lower() + item["msg"][1:]
    return ConfigError(setting, f"{value!r} is not accepted", message[:1].upper() + message[1:])


def unknown_setting(model: type[BaseModel], item: Any) -> list[str]:
    """Return the path of the setting that one of pydantic's findings calls unknown; [] where it says something else."""
    loc = [str(part) for part in item["loc"]]
    return [*_walk(model, loc[:-1])[0], loc[-1]] if item["type"] == "extra_forbidden" else []


def _unknown(
    model: type[BaseModel], path: list[str], name: str, sections: Models, beside: tuple[str, ...]
) -> ConfigError:
    """A setting that does not exist: perhaps a slip of the pen, perhaps one that another kind has."""
    setting = ".".join([*path, name])
    known = sorted({*beside, *(field for section in sections for field in section.model_fields)})
    tag = _tag_at(model, path)
    if tag is not None:
        others = _tags([m for m in _below([model], path) if name in m.model_fields], tag)
        if others:
            (here,) = _tags(sections, tag)
            return ConfigError(
                setting, f"there is no such setting with {tag} {here}", f"It belongs to {', '.join(others)}"
            )
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return ConfigError(
        setting,
        "there is no such setting",
        f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(known)}",
    )


def _walk(model: type[BaseModel], loc: list[str]) -> tuple[list[str], Models]:
    """The settings that a location leads through, without the tags and the alternatives that pydantic puts between them;
    and the sections it leads to."""
    path: list[str] = []
    sections: Models = [model]
    tag: str | None = None
    for part in loc:
        if tag is not None and part in _tags(sections, tag):
            sections, tag = [s for s in sections if part in _tags([s], tag)], None
            continue
        tag = None
        if part.isdigit():  # in a list
            path.append(part)
            continue
        found = [s.model_fields[part] for s in sections if part in s.model_fields]
        if not found:
            continue
        path.append(part)
        tag = next((f.discriminator for f in found if isinstance(f.discriminator, str)), None)
        sections = [m for field in found for m in _models_in(field.annotation)]
    return path, sections


def _tag_at(model: type[BaseModel], path: list[str]) -> str | None:
    """The setting that says which section it is, where there are several."""
    found = [s.model_fields[path[-1]] for s in _below([model], path[:-1]) if path[-1] in s.model_fields] if path else []
    return next((f.discriminator for f in found if isinstance(f.discriminator, str)), None)


def _below(sections: Models, path: list[str]) -> Models:
    for name in (part for part in path if not part.isdigit()):
        sections = [m for s in sections if (f := s.model_fields.get(name)) for m in _models_in(f.annotation)]
    return sections


def _tags(sections: Models, tag: str) -> list[str]:
    """The values of the setting that tells sections apart."""
    return [value for section in sections for value in get_args(section.model_fields[tag].annotation)]


def _models_in(annotation: Any) -> Models:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]
