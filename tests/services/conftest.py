"""Property tests here try the same examples in every run, and no clock can fail them."""

from __future__ import annotations

import pytest
from hypothesis import settings

from services.caller import ANONYMOUS, let_in
from tests.services.certificates import Authority

settings.register_profile("services", deadline=None, derandomize=True)
settings.load_profile("services")


@pytest.fixture(autouse=True)
def nobody_in_particular() -> None:
    """Methods that are called without a server act for the one tenant of a scheduler without keys."""
    let_in(ANONYMOUS)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Makes certificates that this one authority has signed."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another authority, whom nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"))
