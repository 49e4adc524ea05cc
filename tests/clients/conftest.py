"""Live processes for clients that nobody here wrote. Those that are too heavy for .venv have .venv-clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import fake_model
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.gateways import Gateway


@pytest.fixture(scope="session")
def fake_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that only the fake runner can serve."""
    return fake_model.write(tmp_path_factory.mktemp("model") / "fake")


@pytest.fixture(scope="session")
def shared(fake_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and a fake executor that all tests here share; none of them may harm it."""
    with cluster(fake_folder, tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def smollm(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and an executor that computes the default model in float32; none of the tests may harm them."""
    running = Cluster(default_model, tmp_path_factory.mktemp("smollm"))
    try:
        running.start_executor("--dtype=float32", fake=False)
        yield running
    finally:
        running.close()


@pytest.fixture(scope="session")
def gateway(smollm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """OpenAI's API in front of the default model."""
    with Gateway(smollm.address, tmp_path_factory.mktemp("gateway") / "log", f"--http-admin={smollm.admin}") as running:
        yield running
