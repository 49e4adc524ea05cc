"""Kernels compiled ahead: asked for by launches that do not happen, and found by those that do."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's compiler comes for x86_64")


def test_what_is_launched_inside_is_compiled_and_not_run(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    ran = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compile_ahead"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )

    told = json.loads(ran.stdout)
    assert [len(keys) for keys in told["compiled"].values()] == [1, 1]
    assert told["again"] and told["untouched"]
    assert told["loaded"] == sorted(told["compiled"])
