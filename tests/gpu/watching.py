"""What torch is asked to do while a forward runs, so that a test can say what it must not be."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# They wait for the device, or their result's size does; or they bring numbers from the host.
_WAITING: Final = (
    "_local_scalar_dense",
    "index by a mask",
    "nonzero",
    "masked_select",
    "unique",
    "item",
    "lift_fresh",
    "_pin_memory",
)
# They take memory, which a graph may do, but which a forward that is to keep its addresses does not.
_TAKING: Final = ("empty", "zeros", "ones", "full", "arange", "clone", "_to_copy", "cat", "scalar_tensor")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation, and where what it returned lies and how many bytes it has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.addresses: list[int] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(m is not None and m.dtype is torch.bool for m in args[1])
        self.names.append("index by a mask" if masked else name)
        if isinstance(result, Tensor):
            self.addresses.append(result.data_ptr())
            self.sizes.append(result.numel() * result.element_size())
        return result

    @property
    def waiting(self) -> set[str]:
        """Operations that wait for the device."""
        return {name for name in self.names if name in _WAITING}

    @property
    def taking(self) -> set[str]:
        """Operations that take memory."""
        return {name for name in self.names if name.removeprefix("new_").removesuffix("_like") in _TAKING}
