"""Whether a client that is too heavy for .venv is here. `make test` makes an environment that has most of them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(*packages: str) -> None:
    """Skip the test file whose first statement this is, unless all of these can be imported.

    They are not imported: what a client warns of as it starts would be errors here. Most are run as programs anyway.
    """
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test-clients has it", allow_module_level=True)
