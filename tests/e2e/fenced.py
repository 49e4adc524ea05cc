"""The blocks of code in a page, and a place to run them as a reader would, one after the other.

A block that is not to be run says why in its fence: ```sh skip="needs a cluster".
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.cluster import ROOT

_FENCE = re.compile(r'^```(\S*)(?: skip="([^"]+)")?[ ]*\n(.*?)^```', flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block; `skip` is why it is not run, or nothing."""

    language: str
    skip: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """All of a page, in its order."""
    text = page.read_text()
    assert text.count("```") == 2 * len(_FENCE.findall(text)), f"{page}: a fence that is not understood"
    return [
        Block(language=found[1], skip=found[2] or "", code=found[3], line=text.count("\n", 0, found.start()) + 1)
        for found in _FENCE.finditer(text)
    ]


class Reader:
    """Types what a page says, in a folder of its own; `addresses` are where the page's ones really are."""

    def __init__(self, folder: Path, addresses: Mapping[str, str]) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {}
        self._addresses = addresses
        commands = folder / "bin"
        commands.mkdir()
        program = commands / "pagewire"
        program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m services "$@"\n')
        program.chmod(0o755)
        programs = Path(sys.executable).parent
        (folder / ".venv").mkdir()
        (folder / ".venv" / "bin").symlink_to(commands)
        for name in ("buf", "python"):
            (commands / name).symlink_to(programs / name)
        for name in ("examples", "protos"):
            (folder / name).symlink_to(ROOT / name)
        self._environment = {
            **os.environ,
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "PAGEWIRE_HOME": str(folder / "home"),
            "PYTHONUTF8": "1",
        }

    def run(self, block: Block, page: Path) -> None:
        """Fails where it fails."""
        code = block.code
        for said, real in self._addresses.items():
            code = code.replace(said, real)
        if block.language == "python":
            lines = "\n" * block.line  # so that a traceback names the page's line
            exec(compile(lines + code, str(page), "exec"), self.names)
            return
        assert block.language == "sh", f"{page}, line {block.line}: nobody knows how to run {block.language!r}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{page}, line {block.line}:\n{done.stdout}\n{done.stderr}"
