"""Shared by the tests that start processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import fake_model
from tests.e2e.cluster import Cluster, cluster


@pytest.fixture(scope="session")
def fake_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that only the fake runner can serve; it makes vectors, too."""
    return fake_model.add_vectors(fake_model.write(tmp_path_factory.mktemp("model") / "fake"))


@pytest.fixture(scope="module")
def shared(fake_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and one fake executor that the tests of a module share; none of them may harm it."""
    with cluster(fake_folder, tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def slow(fake_folder: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of its own whose answers take half a minute, and which tells at its end what it counted."""
    with cluster(fake_folder, tmp_path, executors=0, flags=["--log-format=json"]) as running:
        running.start_executor("--fake-step-s=0.05")
        yield running


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that torch computes, with a tokenizer whose tokens are bytes."""
    from tests.executor.tiny_models import save_tiny  # noqa: PLC0415 - torch, which most tests here do without

    folder = fake_model.write(tmp_path_factory.mktemp("tiny") / "tiny")
    tokenizer = (folder / "tokenizer.json").read_text()
    save_tiny(
        "llama",
        folder,
        vocab_size=fake_model.VOCAB_SIZE,
        max_position_embeddings=fake_model.MAX_MODEL_LEN,
        eos_token_id=fake_model.EOS,
    )
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


@pytest.fixture(scope="session")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and one executor that computes with it; none of the tests that share them may harm them."""
    running = Cluster(tiny, tmp_path_factory.mktemp("server"))
    try:
        running.start_executor("--dtype=float32", "--threads=1", fake=False)
        yield running
    finally:
        running.close()
