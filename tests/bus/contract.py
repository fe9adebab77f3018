"""What every bus does: the one definition of the port, run against a real nats-server and against the one in memory.

Each test gets a broker of its own with the accounts of `syncline.bus.server.accounts`: a coordinator in CORE, the agents
`a1` and `a2`, and a watcher. Where the two buses once differed, what the server does decided.
"""

from __future__ import annotations

from bus.contract_core import Accounts, Core
from bus.contract_failures import Failures
from bus.contract_store import Blobs, KeyValue, Streams


class Contract(KeyValue, Streams, Blobs, Core, Accounts, Failures):
    """Every test is a method that takes a `Backend` and nothing else."""


TESTS = [name for name in dir(Contract) if name.startswith("test_")]
