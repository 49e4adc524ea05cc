"""What the tests of the executor share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from executor.native.library import native
from tests.interpreter import interpret_without_gpu

interpret_without_gpu()

BEST_ISA = native().isa
SETS = ("baseline", "avx2", "avx512", "amx")


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Tiny models gain nothing from more, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, for tests that only read it."""
    from tests.executor.tiny_models import save_tiny  # noqa: PLC0415 - it takes seconds, and not every test needs it

    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=SETS[: SETS.index(BEST_ISA) + 1])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    native().use_isa(request.param)
    yield request.param
    native().use_isa(BEST_ISA)
