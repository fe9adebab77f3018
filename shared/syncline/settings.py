"""What every section of a run spec is made of. A merge rule or an outer optimiser *is* its section: settings and arithmetic
in one class, chosen by name from a registry in plain sight. So this module knows neither of them, and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Settings(BaseModel):
    """A frozen section: unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def one_of(registry: Mapping[str, type[Settings]], tag: str, default: str) -> Any:
    """The type of a section that is one of a registry's: the setting `tag` says which, and may be left out for the default."""

    def tagged(section: Any) -> Any:
        return {tag: default, **section} if isinstance(section, dict) else section

    return Annotated[Union[tuple(registry.values())], Field(discriminator=tag), BeforeValidator(tagged)]  # noqa: UP007
