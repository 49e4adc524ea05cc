"""Property tests here try the same examples in every run, and no clock can fail them."""

from __future__ import annotations

import pytest
from hypothesis import settings

from services.caller import ANONYMOUS, let_in

settings.register_profile("services", deadline=None, derandomize=True)
settings.load_profile("services")


@pytest.fixture(autouse=True)
def nobody_in_particular() -> None:
    """Methods that are called without a server act for the one tenant of a scheduler without keys."""
    let_in(ANONYMOUS)
