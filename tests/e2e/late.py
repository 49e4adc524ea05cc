"""`python -m tests.e2e.late …`: Pagewire whose fake executors work on their own, with three steps in flight."""

from __future__ import annotations

import functools
import sys

from executor import fake_runner
from services.__main__ import main
from tests.late_runner import LateRunner

if __name__ == "__main__":
    fake_runner.FakeRunner = functools.partial(LateRunner, credit=3)  # type: ignore[assignment,misc]
    sys.exit(main())
