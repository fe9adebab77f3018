"""The base class of all settings, and the conversion of pydantic's errors to a ConfigError with setting, value and
hint.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from syncline.errors import ConfigError

Models = list[type[BaseModel]]


def explain(model: type[BaseModel], item: Any, section: str = "", beside: tuple[str, ...] = ()) -> ConfigError:
    """Return one of pydantic's findings as a ConfigError.

    Args:
        model: the class of the settings that were validated.
        item: the finding, from `ValidationError.errors()`.
        section: path of the model in the spec.
        beside: names of further sections that the file may have.
    """
    kind, value, loc = item["type"], item.get("input"), [str(part) for part in item["loc"]]
    path, sections = _walk(model, loc[:-1] if kind == "extra_forbidden" else loc)
    if kind == "extra_forbidden":
        error = _unknown(model, path, loc[-1], sections, () if path else beside)
        return ConfigError(".".join(filter(None, (section, error.setting))), error.problem, error.hint)
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
    """Return the path of the setting that a finding of pydantic calls unknown; [] for any other finding."""
    loc = [str(part) for part in item["loc"]]
    return [*_walk(model, loc[:-1])[0], loc[-1]] if item["type"] == "extra_forbidden" else []


def _unknown(
    model: type[BaseModel], path: list[str], name: str, sections: Models, beside: tuple[str, ...]
) -> ConfigError:
    """Return the error for a setting that does not exist: a misspelt name, or a setting of another kind of section."""
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
    """Return the settings that a location of pydantic leads through, and the sections that the last one has.

    The location also holds tags and alternatives of unions, which are left out.
    """
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
    """Return the setting that tells several kinds of section apart; None if the section has one kind."""
    found = [s.model_fields[path[-1]] for s in _below([model], path[:-1]) if path[-1] in s.model_fields] if path else []
    return next((f.discriminator for f in found if isinstance(f.discriminator, str)), None)


def _below(sections: Models, path: list[str]) -> Models:
    for name in (part for part in path if not part.isdigit()):
        sections = [m for s in sections if (f := s.model_fields.get(name)) for m in _models_in(f.annotation)]
    return sections


def _tags(sections: Models, tag: str) -> list[str]:
    """Return the values of the setting that tells sections apart."""
    return [value for section in sections for value in get_args(section.model_fields[tag].annotation)]


def _models_in(annotation: Any) -> Models:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


class Settings(BaseModel):
    """A frozen section of settings. Unknown names are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, ser_json_inf_nan="constants"
    )
    beside: ClassVar[tuple[str, ...]] = ()  # sections that stand beside these in a file, and are read elsewhere


def untagged(tag: str, default: str) -> BeforeValidator:
    """Return a validator that adds `tag: default` to a section that leaves the tag out."""
    return BeforeValidator(lambda section: {tag: default, **section} if isinstance(section, dict) else section)


S = TypeVar("S", bound=Settings)


def one_of(registry: Mapping[str, type[S]], base: type[S], tag: str, default: str, group: str) -> Any:
    """Return the type of a section that is one of a registry's classes.

    Args:
        registry: the classes by their tag.
        base: their common base.
        tag: the setting that selects a class.
        default: the tag of a section that leaves it out.
        group: group of entry points by which installed packages add classes of `base`.

    Raises:
        ConfigError: an entry point cannot be used.
    """
    kinds = (*registry.values(), *installed(group, base, tag, known=registry))
    if len(kinds) == 1:
        return Annotated[kinds[0], untagged(tag, default)]
    return Annotated[Union[kinds], Field(discriminator=tag), untagged(tag, default)]  # noqa: UP007


def installed(group: str, base: type[S], tag: str, known: Collection[str] = ()) -> list[type[S]]:
    """Return the classes that installed packages add by entry points.

    Args:
        group: the group of entry points.
        base: the class that they have to derive from.
        tag: the setting whose default has to be the name of the entry point.
        known: names that are taken.

    Raises:
        ConfigError: an entry point cannot be loaded, is another kind of class, or has a name that is taken.
    """
    found: dict[str, type[S]] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        where = f"entry point {entry.name!r} of {group} ({entry.value})"
        try:
            kind = entry.load()
        except Exception as error:  # its module may raise any error
            problem = f"{where} cannot be loaded: {type(error).__name__}: {error}"
            raise ConfigError(group, problem, "Correct its package, or uninstall it") from error
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise ConfigError(group, f"{where} is no class of {base.__name__}", "Derive it, or uninstall its package")
        if kind.model_fields[tag].default != entry.name or entry.name in {*known, *found}:
            problem = f"{where} has {tag} = {kind.model_fields[tag].default!r}"
            hint = f"Give both one name that no other {base.__name__.lower()} has, or uninstall its package"
            raise ConfigError(group, problem, hint)
        found[entry.name] = kind
    return [*found.values()]


def parse(model: type[S], data: Any, section: str = "", ignored: Collection[str] = ()) -> S:
    """Validate settings.

    Args:
        model: the class of the settings.
        data: a mapping.
        section: path of the settings in the spec.
        ignored: names of settings, as `local.steps`, that are left out if the class does not know them.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    if not isinstance(data, dict):
        hint = f"Write settings under `{section}:`" if section else "Start with a line like `task: …`"
        what = "is empty" if data is None else f"is a {type(data).__name__}, not a mapping"
        raise ConfigError(section or "spec", what, hint)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        unknown = [path for item in error.errors() if (path := unknown_setting(model, item))]
        if leave_out := [path for path in unknown if _is_within(path, ignored)]:
            return parse(model, _without(data, leave_out), section)
        problems = _together([explain(model, item, section, model.beside) for item in error.errors()])
        first = problems[0]
        rest = "".join(f"\n{p}" for p in problems[1:])
        raise ConfigError(first.setting, first.problem, first.hint + rest) from None


def _is_within(path: list[str], names: Collection[str]) -> bool:
    """Return whether a setting, or a section around it, is among the names."""
    return any(".".join(path[:end]) in names for end in range(1, len(path) + 1))


def _without(data: dict[str, Any], paths: list[list[str]]) -> dict[str, Any]:
    """Return a copy of nested mappings without the settings at these paths."""
    here = {path[0] for path in paths if len(path) == 1}
    below = {name: [path[1:] for path in paths if path[0] == name and len(path) > 1] for name in data}
    return {
        name: _without(value, below[name]) if below[name] else value for name, value in data.items() if name not in here
    }


def _together(problems: list[ConfigError]) -> list[ConfigError]:
    """Join the hints of findings about the same value: pydantic reports one for each kind that is possible."""
    found: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        found.setdefault((problem.setting, problem.problem), []).append(problem.hint)
    return [ConfigError(*what, ", or ".join([hints[0], *map(_small, hints[1:])])) for what, hints in found.items()]


def _small(hint: str) -> str:
    return hint[:1].lower() + hint[1:]
