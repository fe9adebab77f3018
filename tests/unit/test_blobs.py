"""Bulk over the bus: windows, retries and everything that can be wrong with a blob. Time is simulated where it passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest
from conftest_types import FakeBus  # type: ignore[import-not-found]
