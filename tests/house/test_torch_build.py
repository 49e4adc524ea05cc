"""What `make setup` says before it downloads torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.house import torch_build
from tests.house.torch_build import describe

INDEX = "https://me:secret@download.pytorch.org/whl/cpu"
NEEDS = ["filelock", "sympy>=1.13.3", 'nvidia-cublas==13.1.0.3; platform_system == "Linux"']


def report(version: str, host: str, needs: list[str] | None = None) -> dict[str, Any]:
    """As pip makes it of a dry run, as far as it is read here."""
    url = f"https://somebody:secret@{host}/torch-{version}-cp311-cp311-manylinux_2_28_x86_64.whl"
    metadata = {"name": "torch", "version": version, "requires_dist": needs}
    return {"version": "1", "install": [{"download_info": {"url": url}, "metadata": metadata}]}


def test_the_build_for_cpus_is_told_by_what_it_needs_and_where_it_comes_from() -> None:
    told = describe(report("2.13.0+cpu", "download.pytorch.org", NEEDS[:2]), platform="linux", index=INDEX)

    assert told.startswith("torch 2.13.0+cpu comes from download.pytorch.org: the build for CPUs.")
    assert "CUDA" in told.partition("CPUs.")[2], "and how to have the other one"


def test_where_pip_would_take_the_other_one_it_says_so_and_what_to_type() -> None:
    told = describe(report("2.13.0", "pypi.org", NEEDS), platform="linux", index=INDEX)

    assert "the build for CUDA" in told and "is download.pytorch.org/whl/cpu within reach?" in told
    assert "make setup TORCH_INDEX=URL" in told
    assert "secret" not in told


def test_who_asked_for_it_is_told_what_it_takes_and_no_more() -> None:
    told = describe(report("2.13.0", "pypi.org", NEEDS), platform="linux", index="")

    assert told.splitlines() == [
        "torch 2.13.0 comes from pypi.org: the build for CUDA. With NVIDIA's packages that is about 5 GB more."
    ]


def test_elsewhere_than_on_linux_nothing_of_cudas_comes_along() -> None:
    assert "the build for CPUs" in describe(report("2.13.0", "pypi.org", NEEDS), platform="darwin", index=INDEX)
    assert "the build for CPUs" in describe(report("2.13.0", "pypi.org"), platform="linux", index=INDEX)


def test_without_a_report_nothing_is_said_and_nothing_fails() -> None:
    """Setup goes on, and fails where pip does."""
    done = subprocess.run(
        [sys.executable, "-I", str(Path(torch_build.__file__))], input="", check=True, capture_output=True, text=True
    )

    assert (done.stdout, done.stderr) == ("", "")
