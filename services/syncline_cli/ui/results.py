"""The JSON object that reports a finished run; scripts rely on its keys. Pure."""

from __future__ import annotations

import json
from typing import Any

from syncline.client.follow import RunFollower


def result_of(follower: RunFollower) -> dict[str, Any]:
    """Return the keys that `demo` and `run` share.

    A metric that was not measured, or is not finite, is null. With `evaluate.agents` the key `agents` has the metrics of each
    agent's own model at the end of its last period.
    """
    head, state = follower.head, follower.state
    assert head is not None
    current = state.metrics if state.evaluated == head.version else {}
    of_agents = {name: agent.metrics for name, agent in sorted(state.agents.items()) if agent.metrics}
    return {
        "run": head.run,
        "versions": head.version,
        "seconds": round(follower.seconds, 3),
        "accuracy": current.get("accuracy"),
        "metrics": current,
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "digest": head.digest,
        "reason": head.reason,
        **({"agents": of_agents} if of_agents else {}),
    }


def print_json(result: dict[str, Any]) -> None:
    """Print one JSON object on one line."""
    print(json.dumps(result, allow_nan=False), flush=True)
