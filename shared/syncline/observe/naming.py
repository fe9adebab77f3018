"""The order of names in lists for people."""

from __future__ import annotations


def natural_order(name: str) -> tuple[str, int, str]:
    """Return a sort key that puts a2 before a10."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0), name
