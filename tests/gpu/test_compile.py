"""Every kernel compiles for Hopper and Ampere as it is launched in serving, and fits: no GPU is needed to know that.

The interpreter takes kernels that the compiler refuses, and knows nothing of registers and shared memory.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's compiler comes for x86_64")

SHARED_KIB = {"sm_90": 227, "sm_80": 163}  # what one program can have, of 228 and 164


@pytest.fixture(scope="module", params=SHARED_KIB)
def arch(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def reports(arch: str) -> list[dict[str, Any]]:
    """One for each kernel, by two processes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    halves = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.compile_kernels", arch, f"{half}/2"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for half in range(2)
    ]
    lines = [line for half in halves for line in half.communicate()[0].splitlines()]
    assert [half.returncode for half in halves] == [0, 0]
    return [json.loads(line) for line in lines]


def test_every_kernel_compiles(reports: list[dict[str, Any]]) -> None:
    assert reports
    assert [report for report in reports if "error" in report] == []


def test_no_kernel_spills_registers(reports: list[dict[str, Any]]) -> None:
    assert [report for report in reports if report.get("stack") or report.get("spills")] == []


def test_every_kernel_fits_into_shared_memory(arch: str, reports: list[dict[str, Any]]) -> None:
    assert [report for report in reports if report.get("shared", 0) > SHARED_KIB[arch] * 1024] == []


def test_products_run_on_tensor_cores(reports: list[dict[str, Any]]) -> None:
    wanting = [report for report in reports if report.get("wanted")]

    assert wanting
    assert [report for report in wanting if not set(report["wanted"]) & set(report["instructions"])] == []
