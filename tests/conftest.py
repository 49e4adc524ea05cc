"""What tests of every kind share: the default model, fetched once for this machine, and certificates.

Property tests try the same examples in every run, and no clock can fail them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from common.config import DEFAULT_MODEL
from services.model_store import pull
from tests.certificates import Authority
from tests.interpreter import interpret_without_gpu

settings.register_profile("pagewire", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pagewire")
interpret_without_gpu()  # here, before any test file is imported: some lead to Transformers, and that to triton


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The folder of SmolLM2-135M-Instruct. Fetched once for a machine; no test writes into it."""
    return pull(DEFAULT_MODEL, lambda what, done, total: None)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Makes certificates that this one authority has signed."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another authority, whom nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"))
