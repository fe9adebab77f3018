"""Golden timelines: a seed gives the same timeline, byte for byte, on every supported Python version.

A change of the services' bus operations changes the timelines, and so may a new fault or setting in `seeds.py`. In that case
write them again with `pytest tests/sim/test_golden.py --update-golden`, and compare them on another Python version.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from syncline_sim.seeds import run_seed

GOLDEN = Path(__file__).parent / "golden" / "timelines.json"
SEEDS = range(40)


def digest_of(seed: int) -> str:
    """Return the digest of all bus operations with their times, and of the timeline's text."""
    outcome = run_seed(seed)
    return hashlib.sha256("\n".join([outcome.trace, *outcome.timeline]).encode()).hexdigest()[:32]


def test_a_seed_gives_the_timeline_that_is_kept_on_every_python(request: pytest.FixtureRequest) -> None:
    told = {str(seed): digest_of(seed) for seed in SEEDS}
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(json.dumps(told, indent=0) + "\n")
    kept = json.loads(GOLDEN.read_text())
    differ = sorted((s for s in kept.keys() | told.keys() if kept.get(s) != told.get(s)), key=int)
    assert not differ, (
        f"on Python {sys.version.split()[0]} the timelines of seeds {differ} differ; if meant: --update-golden"
    )
