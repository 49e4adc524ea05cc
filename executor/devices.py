"""Where to compute: what an operator calls a device, to the device there is."""

from __future__ import annotations

import torch

from common.errors import ModelFolderError


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one. Raises ModelFolderError for one that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelFolderError(f"there is no device {name!r}. Type: --device cpu, or --device cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelFolderError("there is no GPU that torch can use here. Type: --device cpu")
    return device
