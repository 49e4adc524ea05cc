"""The known tokens of every slot, on the device: where a row's input comes from and a sampled token goes.

A decode row therefore never waits for its token to travel to the scheduler and back, nor even to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class TokenPool:
    """A table (slots, max_model_len) of token ids. On the CPU it *is* the resident table, elsewhere its mirror."""

    def __init__(self, resident_token_ids: NDArray[np.int32], device: torch.device) -> None:
        self._table = resident_token_ids.reshape(-1)  # shares its memory
        self._host = torch.from_numpy(resident_token_ids)
        self._is_host = device.type == "cpu"
        self._device = self._host if self._is_host else self._host.to(device)

    def admit(self, slots: Iterable[int]) -> None:
        """Bring the tokens of newly admitted sequences to the device."""
        if not self._is_host:
            for slot in slots:
                self._device[slot].copy_(self._host[slot])

    def take(self, places: NDArray[np.int64]) -> Tensor:
        """Return the tokens at `places` (T,) of the flattened table, int64 on the device."""
        if self._is_host:
            return torch.from_numpy(self._table[places].astype(np.int64))
        return self._device.view(-1)[torch.from_numpy(places).to(self._device.device)].long()

    def put(self, places: NDArray[np.int64], tokens: Sequence[int]) -> None:
        """Write sampled tokens (S,) to their places, so that the next step finds them."""
        if not self._is_host:  # into the resident table `advance` writes them
            values = torch.tensor(tokens, dtype=torch.int32, device=self._device.device)
            self._device.view(-1)[torch.from_numpy(places).to(self._device.device)] = values
