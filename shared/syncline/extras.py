"""Optional parts of an installation. The base package holds everything that an agent and a coordinator need."""

from __future__ import annotations

import importlib
import importlib.util

from syncline.errors import ConfigError


def missing_extra(setting: str, module: str, extra: str) -> ConfigError:
    """Return the error for a module that is not installed; it names the extra that brings the module.

    Args:
        setting: the command or setting that needs the module.
        module: the import name.
        extra: `local`, `sim` or `experiments`, as in pyproject.toml.
    """
    return ConfigError(
        setting, f"the Python package {module} is not installed", f"Run: pip install 'syncline[{extra}]'"
    )


def require_modules(setting: str, extra: str, *modules: str) -> None:
    """Raise ConfigError for the first module that is not installed. Nothing is imported but parent packages."""
    for module in modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except ImportError:
            found = False
        if not found:
            raise missing_extra(setting, module, extra)
