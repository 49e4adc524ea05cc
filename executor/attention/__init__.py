"""Paged attention: one protocol, several backends, one contract suite. `choose` picks the backend of each layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from common.errors import ModelFolderError
from executor.attention.protocol import AttentionBackend, LayerNeeds
from executor.attention.reference import ReferenceAttention
from executor.attention.torch_sdpa import SdpaAttention

_log = logging.getLogger(__name__)

BACKENDS: tuple[AttentionBackend, ...] = (SdpaAttention(), ReferenceAttention())
"""Fastest first; the last one serves everything."""


def choose(layers: Sequence[LayerNeeds], wanted: str = "auto") -> list[AttentionBackend]:
    """Return each layer's backend: the first that serves it, or the wanted one.

    Raises ModelFolderError when `wanted` is unknown or does not serve a layer.
    """
    candidates = [backend for backend in BACKENDS if wanted in ("auto", backend.name)]
    if not candidates:
        names = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
        raise ModelFolderError(f"no attention backend is called {wanted!r}; there are: {names}")
    chosen: list[AttentionBackend] = []
    said: set[str] = set()
    for number, layer in enumerate(layers):
        reasons: list[str] = []
        for backend in candidates:
            reason = backend.why_not(layer)
            if reason is None:
                chosen.append(backend)
                break
            reasons.append(f"{backend.name}: {reason}")
        else:
            raise ModelFolderError(f"no attention backend for layer {number}: {'; '.join(reasons)}")
        said.add(f"{chosen[-1].name}" + (f" (not {'; '.join(reasons)})" if reasons else ""))
    _log.info("attention: %s", ", ".join(sorted(said)))
    return chosen
