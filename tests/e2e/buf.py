"""`buf curl` without a schema: what it knows of a server, it knows by reflection."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.e2e.programs import Ended, run

_BUF = str(Path(sys.executable).with_name("buf"))


def curl(address: str, path: str = "", *flags: str) -> Ended:
    return run(_BUF, "curl", "--protocol", "grpc", *flags, f"http://{address}/{path}")


def messages(text: str) -> list[dict[str, Any]]:
    """The JSON documents that stand in `text` one after another."""
    found: list[dict[str, Any]] = []
    while text := text.lstrip():
        message, end = json.JSONDecoder().raw_decode(text)
        found.append(message)
        text = text[end:]
    return found
