"""The command `syncline`, also as `python -m syncline_cli`. Imports nothing before Ctrl-C is answered in good order."""

from __future__ import annotations

import os
import sys


def main() -> int:
    try:
        _keep_working_directory_off_the_path()
        from syncline_cli.main import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _keep_working_directory_off_the_path() -> None:
    """Start this command again, as the same process, where Python has the working directory on `sys.path`, or would put it
    there in the processes of a task: `queue.py` there must shadow nothing. Put there by `python -m` and `python -c`, and by
    an empty entry of PYTHONPATH, which `PYTHONPATH=$PYTHONPATH:/more` leaves."""
    path = os.environ.get("PYTHONPATH", "")
    named = os.pathsep.join(filter(None, path.split(os.pathsep)))
    if sys.flags.safe_path and named == path:
        return
    os.environ["PYTHONPATH"] = named
    os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
