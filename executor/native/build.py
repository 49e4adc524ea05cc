"""Compile the kernels: `python -m executor.native.build`. Never at request time, and only when the sources changed.

torch's extension builder is not used: it would read torch's headers into every file (a minute instead of seconds) and
tie the result to one torch version, and nothing here needs a tensor.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parent / "csrc"
BUILT: Final = Path(__file__).parent / "built"
_FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=fast")


def library_path() -> Path:
    """Where the library of these very sources lies, once it is built."""
    digest = hashlib.sha256("\0".join((sysconfig.get_platform(), *_FLAGS)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return BUILT / f"pagewire-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile if need be, and return the library. Raises BuildError when there is no compiler, or it fails."""
    target = library_path()
    if target.exists():
        return target
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise BuildError("no C++ compiler was found. Type: apt-get install g++, or set CXX")
    BUILT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(folder) / source.with_suffix(".o").name for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda pair: _run([compiler, *_FLAGS, "-c", *pair]), _pairs(sources, objects)):
                pass
        linked = Path(folder) / target.name
        _run([compiler, "-shared", *map(str, objects), "-o", str(linked)])
        arrived = target.with_suffix(f".{os.getpid()}")  # on the same disk, so that it can appear all at once
        shutil.copy(linked, arrived)
        arrived.replace(target)
    for old in BUILT.glob("pagewire-*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


class BuildError(Exception):
    """The kernels could not be compiled."""


def _pairs(sources: list[Path], objects: list[Path]) -> list[tuple[str, str, str]]:
    return [(str(source), "-o", str(made)) for source, made in zip(sources, objects, strict=True)]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def main() -> None:
    """Build and say where; a machine without a compiler still serves, by torch alone."""
    try:
        print(f"kernels: {build().name}")  # noqa: T201 - a command's answer
    except BuildError as error:
        print(f"kernels: not built, torch will be used instead: {error}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
