"""What programs for Node depend on: installed once for each lock file on this machine, found again offline."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def node_modules(folder: Path) -> Path:
    """Those of the package.json in `folder`, where nothing is installed. Skips where there is no Node."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: what is for Node is NOT tested")
    lock = (folder / "package-lock.json").read_bytes()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pagewire-tests"
    installed = caches / f"node-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not installed.exists():
        caches.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=caches) as workspace:
            making = Path(workspace, "making")
            making.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(folder / name, making)
            subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=making, check=True)
            try:
                making.rename(installed)
            except OSError:  # another run of the tests was first
                assert installed.exists()
    return installed / "node_modules"
