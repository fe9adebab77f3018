"""Golden traces of policies: commands as JSON, with the type of each reason."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from syncline.policy.events import Command, Drop, Finish


def command_as_json(command: Command) -> list[Any]:
    """Return the command's type and fields. A reason that can have several types is told with its type."""
    fields = asdict(command)
    if isinstance(command, Drop | Finish):
        fields["reason"] = [type(command.reason).__name__, fields["reason"]]
    return [type(command).__name__, fields]
