"""What tests of every kind share: the default model, fetched once for this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import DEFAULT_MODEL
from services.model_store import pull


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The folder of SmolLM2-135M-Instruct. Fetched once for a machine; no test writes into it."""
    return pull(DEFAULT_MODEL, lambda what, done, total: None)
