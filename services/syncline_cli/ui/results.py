"""What a finished run is reported as: the JSON object that scripts rely on. Pure."""

from __future__ import annotations

import json
from typing import Any

from syncline.client.follow import RunFollower


def result_of(follower: RunFollower) -> dict[str, Any]:
    """The keys that `demo` and `run` share. A metric that was not measured, or is not finite, is null.

    With `evaluate.agents` also `agents`: what each agent's own model reached at the end of its last period.
    """
    head, state = follower.head, follower.state
    assert head is not None
    current = state.metrics if state.evaluated == head.version else {}
    own = {name: agent.metrics for name, agent in sorted(state.agents.items()) if agent.metrics}
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
        **({"agents": own} if own else {}),
    }


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, allow_nan=False), flush=True)
