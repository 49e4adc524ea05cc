"""Every test, in two processes: `python -m tests.run_all`, which is `make test`.

Tests of the GPU's kernels compute in Triton's interpreter for minutes and open no socket; the others wait for processes
much of the time. So the former run beside the latter, with what they leave of the machine. Arguments are pytest's, and
then one pytest has them all.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Final

_PYTEST: Final = [sys.executable, "-m", "pytest"]
_BESIDE: Final = "tests/gpu"
_NICENESS: Final = 10


def main(arguments: Sequence[str]) -> int:
    """0 if all passed, else what pytest returned."""
    if arguments:
        return subprocess.call([*_PYTEST, *arguments])
    with tempfile.TemporaryFile() as said:
        nice = ["nice", "-n", str(_NICENESS)]
        beside = subprocess.Popen([*nice, *_PYTEST, _BESIDE], stdout=said, stderr=subprocess.STDOUT)
        try:
            status = subprocess.call([*_PYTEST, "--ignore", _BESIDE])
            print(f"\n---- {_BESIDE}, which ran meanwhile", flush=True)
            status_beside = beside.wait()
        finally:
            beside.kill()
        said.seek(0)
        sys.stdout.flush()
        shutil.copyfileobj(said, sys.stdout.buffer)
    return status or status_beside


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
