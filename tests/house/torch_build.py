"""Says which build of torch pip is about to take: `pip install --dry-run --report - … torch | python torch_build.py`.

`make setup` asks before anything large is downloaded. The CPU and the CUDA build are the same version, so where the
index of the one cannot be reached pip takes the other without a word. A file of its own, and nothing but the standard
library: nothing else is installed yet.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

_CUDA: Final = ("nvidia", "cuda", "triton")


def describe(report: Mapping[str, Any], *, platform: str, index: str) -> str:
    """A line or two for who waits. `report` is pip's; `index`: where the CPU build was looked for, if anywhere."""
    (torch,) = report["install"]
    version, host = torch["metadata"]["version"], urlsplit(torch["download_info"]["url"]).hostname or "a folder here"
    needs = torch["metadata"].get("requires_dist") or []
    if not (platform == "linux" and any(need.startswith(_CUDA) for need in needs)):
        return (
            f"torch {version} comes from {host}: the build for CPUs. `make setup TORCH_INDEX=` takes the one for CUDA."
        )
    told = f"torch {version} comes from {host}: the build for CUDA. With NVIDIA's packages that is about 5 GB more."
    if not index:
        return told
    where = urlsplit(index)
    return (
        f"{told}\nNo build for CPUs was found: is {where.hostname}{where.path} within reach?\n"
        "To take it from elsewhere, break off and type: rm -rf .venv; make setup TORCH_INDEX=URL"
    )


def main() -> None:
    """Read the report and say so. Without one there is nothing to say: pip has told why."""
    if told := sys.stdin.read().strip():
        print(describe(json.loads(told), platform=sys.platform, index=os.environ.get("TORCH_INDEX", "")))


if __name__ == "__main__":
    main()
