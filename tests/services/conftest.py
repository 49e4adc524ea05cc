"""Who calls is nobody in particular, unless a test says so."""

from __future__ import annotations

import pytest

from services.caller import ANONYMOUS, let_in


@pytest.fixture(autouse=True)
def nobody_in_particular() -> None:
    """Methods that are called without a server act for the one tenant of a scheduler without keys."""
    let_in(ANONYMOUS)
