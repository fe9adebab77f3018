"""The command `syncline`, also as `python -m syncline_cli`. Imports nothing before Ctrl-C is answered in good order."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from syncline_cli.main import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
