"""Kernels and what drives them: on a GPU where there is one, else small and in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.interpreter import interpret_without_gpu

interpret_without_gpu()


class _WithoutTriton(pytest.Module):
    """A test file that cannot even be imported."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        pytest.skip("triton is not installed; pip install 'pagewire[dev]' brings it", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip in clear words where triton is missing."""
    if importlib.util.find_spec("triton") is not None:
        return None
    skipped: pytest.Module = _WithoutTriton.from_parent(parent, path=module_path)
    return skipped


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are for a CUDA device alone."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU that stands in for it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
