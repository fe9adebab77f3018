"""The command `syncline`, also as `python -m syncline_cli`. Nothing is imported before Ctrl-C is handled."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command and return its exit code."""
    try:
        _keep_working_directory_off_the_path()
        from syncline_cli.main import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _keep_working_directory_off_the_path() -> None:
    """Restart this command in the same process if Python searches the working directory for modules.

    A `queue.py` in the user's directory must not shadow the standard library, here or in the processes of a task. `python -m`,
    `python -c` and an empty entry of PYTHONPATH (as `PYTHONPATH=$PYTHONPATH:/more` leaves) put the directory on `sys.path`.
    """
    path = os.environ.get("PYTHONPATH", "")
    named = os.pathsep.join(filter(None, path.split(os.pathsep)))
    if sys.flags.safe_path and named == path:
        return
    os.environ["PYTHONPATH"] = named
    os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
