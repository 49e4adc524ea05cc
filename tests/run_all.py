"""Every test, in three processes at a time: `python -m tests.run_all`, which is `make test`.

Tests of executors compute for minutes and open no socket, those of the GPU's kernels in Triton's interpreter; those
from end to end wait for processes much of the time. So all of these run beside the others, the computing ones with what
the others leave of the machine. Behind the others come the clients that nobody here wrote, by the environment that has
them. Arguments are pytest's, and then one pytest has them all.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Final

_PYTEST: Final = [sys.executable, "-m", "pytest"]
_CLIENTS: Final = "tests/clients"
_THEIR_PYTHON: Final = Path(__file__).resolve().parents[1] / ".venv-clients" / "bin" / "python"
_BESIDE: Final = {("tests/executor", "tests/gpu"): 5, ("tests/e2e",): 0}  # folders -> niceness


def main(arguments: Sequence[str]) -> int:
    """0 if all passed, else what pytest returned."""
    if arguments:
        return subprocess.call([*_PYTEST, *arguments])
    with ExitStack() as stack:
        running: list[tuple[tuple[str, ...], subprocess.Popen[bytes]]] = []
        said = {folders: stack.enter_context(tempfile.TemporaryFile()) for folders in _BESIDE}
        for folders, niceness in _BESIDE.items():
            command = ["nice", "-n", str(niceness), *_PYTEST, *folders]
            beside = subprocess.Popen(command, stdout=said[folders], stderr=subprocess.STDOUT)
            stack.callback(beside.kill)
            running.append((folders, beside))
        elsewhere = [f"--ignore={folder}" for folder in (_CLIENTS, *chain(*_BESIDE))]
        statuses = [subprocess.call([*_PYTEST, *elsewhere])]
        statuses.append(subprocess.call([str(_THEIR_PYTHON), "-m", "pytest", _CLIENTS]))
        for folders, beside in running:
            print(f"\n---- {' and '.join(folders)}, which ran meanwhile", flush=True)
            statuses.append(beside.wait())
            said[folders].seek(0)
            shutil.copyfileobj(said[folders], sys.stdout.buffer)
            sys.stdout.flush()
    return next((status for status in statuses if status), 0)  # below 0 where a signal ended one


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
