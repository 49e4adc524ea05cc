"""Everything that only a GPU can show, in minutes: `make gpu-check`, or python -m tests.gpu.check --out FOLDER."""

from __future__ import annotations

import sys

from tests.gpu.check.program import main

if __name__ == "__main__":
    sys.exit(main())
