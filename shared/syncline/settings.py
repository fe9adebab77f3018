"""What every section of a run spec is made of, and how one is read. A merge rule, an outer optimiser or a staleness weight
*is* its section: settings and arithmetic in one class, chosen by name from a registry in plain sight. So this module knows
none of them, and no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, TypeVar, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from syncline.errors import ConfigError
from syncline.explain import explain, unknown_setting


class Settings(BaseModel):
    """A frozen section: unknown names are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, ser_json_inf_nan="constants"
    )
    beside: ClassVar[tuple[str, ...]] = ()  # sections that stand beside these in a file, and are read elsewhere


def untagged(tag: str, default: str) -> BeforeValidator:
    """For a section of several kinds: the one that is meant where `tag` is left out."""
    return BeforeValidator(lambda section: {tag: default, **section} if isinstance(section, dict) else section)


S = TypeVar("S", bound=Settings)


def one_of(registry: Mapping[str, type[S]], base: type[S], tag: str, default: str, group: str) -> Any:
    """The type of a section that is one of a registry's: the setting `tag` says which, and may be left out for the default.

    `group`: installed packages may add some of `base`, as entry points of that name. Raises ConfigError for one that is none.
    """
    kinds = (*registry.values(), *installed(group, base, tag, known=registry))
    return Annotated[Union[kinds], Field(discriminator=tag), untagged(tag, default)]  # noqa: UP007


def installed(group: str, base: type[S], tag: str, known: Collection[str] = ()) -> list[type[S]]:
    """What installed packages bring: classes of `base` under the name that is their `tag`. Raises ConfigError."""
    found: dict[str, type[S]] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        where = f"entry point {entry.name!r} of {group} ({entry.value})"
        try:
            kind = entry.load()
        except Exception as error:  # whatever its module raises
            problem = f"{where} cannot be loaded: {type(error).__name__}: {error}"
            raise ConfigError(group, problem, "Mend its package, or uninstall it") from error
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise ConfigError(group, f"{where} is no class of {base.__name__}", "Derive it, or uninstall its package")
        if kind.model_fields[tag].default != entry.name or entry.name in {*known, *found}:
            problem = f"{where} has {tag} = {kind.model_fields[tag].default!r}"
            mend = f"Give both one name that no other {base.__name__.lower()} has, or uninstall its package"
            raise ConfigError(group, problem, mend)
        found[entry.name] = kind
    return [*found.values()]


def parse(model: type[S], data: Any, section: str = "", ignored: Collection[str] = ()) -> S:
    """Validated settings, or one ConfigError that lists everything wrong.

    Args:
        model: the class of the settings.
        data: a mapping.
        section: where in the spec they stand.
        ignored: names of settings, as `local.steps`, that are left out where the class does not know them.
    """
    if not isinstance(data, dict):
        mend = f"Write settings under `{section}:`" if section else "Start with a line like `task: …`"
        what = "is empty" if data is None else f"is a {type(data).__name__}, not a mapping"
        raise ConfigError(section or "spec", what, mend)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        unknown = [path for item in error.errors() if (path := unknown_setting(model, item))]
        if leave_out := [path for path in unknown if _is_within(path, ignored)]:
            return parse(model, _without(data, leave_out), section)
        problems = _together([explain(model, item, section, model.beside) for item in error.errors()])
        first = problems[0]
        rest = "".join(f"\n{p}" for p in problems[1:])
        raise ConfigError(first.setting, first.problem, first.mend + rest) from None


def _is_within(path: list[str], names: Collection[str]) -> bool:
    """Whether a setting, or a section that it stands in, is among the names."""
    return any(".".join(path[:end]) in names for end in range(1, len(path) + 1))


def _without(data: dict[str, Any], paths: list[list[str]]) -> dict[str, Any]:
    """A copy of nested mappings without the settings at these paths."""
    here = {path[0] for path in paths if len(path) == 1}
    below = {name: [path[1:] for path in paths if path[0] == name and len(path) > 1] for name in data}
    return {
        name: _without(value, below[name]) if below[name] else value for name, value in data.items() if name not in here
    }


def _together(problems: list[ConfigError]) -> list[ConfigError]:
    """One for each value: where several kinds are possible, pydantic says of each of them why it is not that."""
    found: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        found.setdefault((problem.setting, problem.problem), []).append(problem.mend)
    return [ConfigError(*what, ", or ".join([mends[0], *map(_small, mends[1:])])) for what, mends in found.items()]


def _small(mend: str) -> str:
    return mend[:1].lower() + mend[1:]
