"""What the client takes from the server's packages, without putting their names on anybody's path.

`common`, `protos` and `services` are words that a program may well use for packages of its own. So unless this process
is one of Pagewire's, where those names are ours, they are imported as parts of `pagewire.app`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

_APP = "pagewire.app"


def app_folder() -> Path:
    """The folder that holds the server's packages: pagewire/app/ when installed, the root in a checkout."""
    package = Path(__file__).resolve().parent
    bundled = package / "app"
    return bundled if bundled.is_dir() else package.parent


def borrow(name: str) -> types.ModuleType:
    """The server's module of that name. It must import nothing of the server's itself."""
    package = name.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin and Path(spec.origin).resolve().parent == app_folder() / package:
        return importlib.import_module(name)
    if _APP not in sys.modules and importlib.util.find_spec(_APP) is None:  # in a checkout there is no such folder
        app = types.ModuleType(_APP)
        app.__path__ = [str(app_folder())]
        sys.modules[_APP] = app
    return importlib.import_module(f"{_APP}.{name}")
