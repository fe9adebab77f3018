"""The base class of all settings, and the conversion of pydantic's errors into ConfigError with setting, value and hint."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from syncline.errors import ConfigError

Models = list[type[BaseModel]]


def explain(model: type[BaseModel], item: Any, section: str = "", beside: tuple[str, ...] = ()) -> ConfigError:
    """Convert one of pydantic's errors into a ConfigError.

    Args:
        model: the class of the settings.
        item: an element of `ValidationError.errors()`.
        section: the path of the settings in the spec, for the error.
        beside: names that a file may have beside these settings, for suggestions.
    """
    kind = item["type"]
    value = item.get("input")
    loc = [str(part) for part in item["loc"]]
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
    """Return the path of the setting that one of pydantic's errors calls unknown; [] for any other error."""
    loc = [str(part) for part in item["loc"]]
    return [*_walk(model, loc[:-1])[0], loc[-1]] if item["type"] == "extra_forbidden" else []


def _unknown(
    model: type[BaseModel], path: list[str], name: str, sections: Models, beside: tuple[str, ...]
) -> ConfigError:
    """Return the error about a setting that does not exist: perhaps mistyped, perhaps a setting of another kind."""
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
    """Follow a location of pydantic's, which has tags and alternatives between the names of the settings.

    Returns:
        The names on the way, without tags and alternatives, and the classes of the sections at the end.
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
    """Return the setting that selects the kind of the section at a path; None for a section of one kind."""
    found = [s.model_fields[path[-1]] for s in _below([model], path[:-1]) if path[-1] in s.model_fields] if path else []
    return next((f.discriminator for f in found if isinstance(f.discriminator, str)), None)


def _below(sections: Models, path: list[str]) -> Models:
    """Return the classes of the sections at a path below these."""
    for name in (part for part in path if not part.isdigit()):
        sections = [m for s in sections if (f := s.model_fields.get(name)) for m in _models_in(f.annotation)]
    return sections


def _tags(sections: Models, tag: str) -> list[str]:
    """Return the values of the setting that selects among these sections."""
    return [value for section in sections for value in get_args(section.model_fields[tag].annotation)]


def _models_in(annotation: Any) -> Models:
    """Return the classes of settings in a type annotation, such as both of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


class Settings(BaseModel):
    """A section of settings: immutable, without unknown names and without infinite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, ser_json_inf_nan="constants"
    )
    beside: ClassVar[tuple[str, ...]] = ()  # sections beside these in a file that other code reads


def untagged(tag: str, default: str) -> BeforeValidator:
    """Return a validator that sets `tag` to a default if a section of several kinds leaves it out."""
    return BeforeValidator(lambda section: {tag: default, **section} if isinstance(section, dict) else section)


S = TypeVar("S", bound=Settings)


def one_of(registry: Mapping[str, type[S]], base: type[S], tag: str, default: str, group: str) -> Any:
    """Return the type of a section with several kinds, for use as an annotation.

    Args:
        registry: the built-in kinds by name.
        base: the base class of all kinds.
        tag: the setting that selects the kind.
        default: the kind of a section without `tag`.
        group: the entry points under which installed packages add kinds.

    Raises:
        ConfigError: an installed package adds a kind that is not valid.
    """
    kinds = (*registry.values(), *installed(group, base, tag, known=registry))
    if len(kinds) == 1:
        return Annotated[kinds[0], untagged(tag, default)]
    return Annotated[Union[kinds], Field(discriminator=tag), untagged(tag, default)]  # noqa: UP007


def installed(group: str, base: type[S], tag: str, known: Collection[str] = ()) -> list[type[S]]:
    """Return the kinds of a section that installed packages add.

    Args:
        group: the name of their entry points. The name of an entry point is the value of `tag`.
        base: the base class of all kinds.
        tag: the setting that selects the kind.
        known: names of kinds that packages may not add.

    Raises:
        ConfigError: an entry point cannot be loaded, is not a class of `base`, or has a name that is taken.
    """
    found: dict[str, type[S]] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        place = f"entry point {entry.name!r} of {group} ({entry.value})"
        try:
            kind = entry.load()
        except Exception as error:  # a foreign module may raise any error
            problem = f"{place} cannot be loaded: {type(error).__name__}: {error}"
            raise ConfigError(group, problem, "Repair its package, or uninstall it") from error
        if not (isinstance(kind, type) and issubclass(kind, base)):
            hint = f"Derive the class from {base.__name__}, or uninstall its package"
            raise ConfigError(group, f"{place} is not a class of {base.__name__}", hint)
        if kind.model_fields[tag].default != entry.name or entry.name in {*known, *found}:
            problem = f"{place} has {tag} = {kind.model_fields[tag].default!r}"
            hint = f"Give both one name that no other {base.__name__.lower()} has, or uninstall its package"
            raise ConfigError(group, problem, hint)
        found[entry.name] = kind
    return [*found.values()]


def parse(model: type[S], data: Any, section: str = "", ignored: Collection[str] = ()) -> S:
    """Validate settings.

    Args:
        model: the class of the settings.
        data: a mapping of names to values.
        section: the path of the settings in the spec, for the errors.
        ignored: names of settings, as `local.steps`, that are left out if the class does not know them.

    Raises:
        ConfigError: the data is not a mapping or has settings that are not valid. The error lists all of them.
    """
    if not isinstance(data, dict):
        hint = f"Write settings under `{section}:`" if section else "Start with a line like `task: …`"
        problem = "is empty" if data is None else f"is a {type(data).__name__}, not a mapping"
        raise ConfigError(section or "spec", problem, hint)
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
    """Return whether a setting, or a section that contains it, is among the names."""
    return any(".".join(path[:end]) in names for end in range(1, len(path) + 1))


def _without(data: dict[str, Any], paths: list[list[str]]) -> dict[str, Any]:
    """Return a copy of nested mappings without the settings at these paths."""
    here = {path[0] for path in paths if len(path) == 1}
    below = {name: [path[1:] for path in paths if path[0] == name and len(path) > 1] for name in data}
    return {
        name: _without(value, below[name]) if below[name] else value for name, value in data.items() if name not in here
    }


def _together(problems: list[ConfigError]) -> list[ConfigError]:
    """Merge the errors about one value into one. pydantic reports an error for each kind that a section may have."""
    found: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        found.setdefault((problem.setting, problem.problem), []).append(problem.hint)
    return [
        ConfigError(setting, problem, ", or ".join([hints[0], *map(_small, hints[1:])]))
        for (setting, problem), hints in found.items()
    ]


def _small(hint: str) -> str:
    """Return the hint with a small first letter, to follow another hint."""
    return hint[:1].lower() + hint[1:]
