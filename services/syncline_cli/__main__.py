"""`python -m syncline_cli` is `syncline`."""

from __future__ import annotations

import sys

from syncline_cli.main import main

sys.exit(main())
