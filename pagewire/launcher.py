"""The `pagewire` command: find the server's packages, then start `services`.

Pagewire is an application: `common`, `scheduler`, `executor`, `services` and `protos` are its own words and must never
stand at the top of site-packages, where other projects own these names. So a wheel carries them in pagewire/app/, and
in a checkout (or an editable install of it) they lie beside pagewire/. Either folder goes first on the path.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pagewire.borrowed import app_folder


def put_first(folder: Path) -> None:
    """Make this process and its Python children import from `folder` before anywhere else."""
    sys.path.insert(0, str(folder))
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), inherited] if inherited else [str(folder)])
    # `python -m services` in a child would look in the working directory first, and `services` is a common name
    os.environ["PYTHONSAFEPATH"] = "1"


def main() -> int | None:
    """Run the command line in services/__main__.py and return its exit code."""
    put_first(app_folder())
    from services.__main__ import main as services_main  # importable only from here on

    return services_main()
