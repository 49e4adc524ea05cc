"""Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before they load."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a test live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
