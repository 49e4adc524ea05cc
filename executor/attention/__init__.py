"""Paged attention: one protocol, several backends, one contract suite. `choose` picks the backend of each layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from common.errors import ModelFolderError
from executor.attention.flashinfer import FlashInferAttention
from executor.attention.native import NativeAttention
from executor.attention.protocol import AttentionBackend, LayerNeeds
from executor.attention.reference import ReferenceAttention
from executor.attention.torch_sdpa import SdpaAttention
from executor.attention.triton import TritonAttention

_log = logging.getLogger(__name__)

BACKENDS: tuple[AttentionBackend, ...] = (
    TritonAttention(),
    NativeAttention(),
    SdpaAttention(),
    ReferenceAttention(),
)
"""Fastest first; the last one serves everything."""

BY_NAME: tuple[AttentionBackend, ...] = (FlashInferAttention(),)
"""Not chosen unless it is wanted."""


def choose(layers: Sequence[LayerNeeds], wanted: str = "auto") -> list[AttentionBackend]:
    """Return each layer's backend: the first that serves it, or the wanted one. Packed ones serve all layers or none.

    Raises ModelFolderError when `wanted` is unknown or does not serve a layer.
    """
    known = (*BACKENDS, *BY_NAME)
    candidates = BACKENDS if wanted == "auto" else [backend for backend in known if backend.name == wanted]
    if not candidates:
        names = ", ".join(["auto", *(backend.name for backend in known)])
        raise ModelFolderError(f"no attention backend is called {wanted!r}; there are: {names}")
    chosen = [_choose_one(number, layer, candidates) for number, layer in enumerate(layers)]
    if len({backend.packed for backend, _ in chosen}) > 1:
        rows = [backend for backend in candidates if not backend.packed]
        chosen = [_choose_one(number, layer, rows) for number, layer in enumerate(layers)]
    said = {backend.name + (f" (not {'; '.join(reasons)})" if reasons else "") for backend, reasons in chosen}
    _log.info("attention: %s", ", ".join(sorted(said)))
    return [backend for backend, _ in chosen]


def _choose_one(
    number: int, layer: LayerNeeds, candidates: Sequence[AttentionBackend]
) -> tuple[AttentionBackend, list[str]]:
    """The first that serves the layer, and why those before it do not."""
    reasons: list[str] = []
    for backend in candidates:
        reason = backend.why_not(layer)
        if reason is None:
            return backend, reasons
        reasons.append(f"{backend.name}: {reason}")
    raise ModelFolderError(f"no attention backend for layer {number}: {'; '.join(reasons)}")
