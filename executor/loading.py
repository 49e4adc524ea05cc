"""A model folder to a model with its weights: without Transformers where it is not needed, else by it.

Transformers is imported here, inside functions: to import it takes longer than to read the default model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from common.model_folder import ModelFolder
from executor.attention.native import NativeAttention
from executor.attention.protocol import AttentionBackend, LayerNeeds
from executor.attention.triton import TritonAttention
from executor.batch import InputBatch
from executor.gpu.llama import why_not as why_not_gpu_llama
from executor.kv_cache import KvCache
from executor.llama import why_not as why_not_fused
from executor.llama_folder import FolderLlama, open_llama
from executor.native.library import NativeMissing, native

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Forward(Protocol):
    """A model over the slab: one batch in, logits out."""

    hidden: Tensor | None  # (E, H) behind the last norm, of the last batch's rows that embed; void at the next call

    def forward(self, batch: InputBatch, token_ids: Tensor, /) -> Tensor:
        """Compute every token of the batch; return logits (S, vocab_size), void at the next call."""
        ...


class Loaded(NamedTuple):
    """A model with its weights, not yet packed or placed in a slab."""

    model: PreTrainedModel | FolderLlama
    needs: list[LayerNeeds]
    longest: int | None  # tokens of one sequence that its positions allow


def open_model(
    folder: ModelFolder,
    *,
    dtype: str,
    device: torch.device,
    attention: str,
    kind: int | None,
    block_size: int,
    fused_on_gpu: bool = False,
) -> Loaded:
    """Load the folder. `dtype` is auto, float32, bfloat16 or float16; `kind` that of weights that are to be quantised.

    `fused_on_gpu` says that the caller runs what executor/gpu/llama.py accepts by that, and by nothing else.

    Raises ModelFolderError when it cannot be served.
    """
    loaded = None
    if device.type == "cpu" and attention in ("auto", NativeAttention.name):
        loaded = _open_for_native(folder, dtype, kind, block_size)
    elif fused_on_gpu and attention in ("auto", TritonAttention.name):
        loaded = _open_for_gpu(folder, dtype, device, block_size)
    if loaded is not None:
        return loaded
    from executor.paged_model import probe_layers
    from executor.weights import load_model, max_positions

    model = load_model(folder.path, dtype=dtype, device=device, has_head=folder.makes_text)
    needs = [replace(layer, block_size=block_size) for layer in probe_layers(model, folder.vocab_size)]
    return Loaded(model, needs, max_positions(model.config.get_text_config()))


def transformers_forward(
    loaded: Loaded, cache: KvCache, backends: Sequence[AttentionBackend], kind: int | None
) -> Forward:
    """Transformers' own forward, with the modules swapped that can be."""
    from executor.paged_model import PagedModel
    from executor.swap import swap

    assert not isinstance(loaded.model, FolderLlama), "opened for the fused forward, and for nothing else"
    swap(loaded.model, kind)
    return PagedModel(loaded.model, cache, backends)


def _open_for_native(folder: ModelFolder, dtype: str, kind: int | None, block_size: int) -> Loaded | None:
    """None also where the fused forward could not serve it: nothing else can run what was opened so."""
    try:
        native()
    except NativeMissing:
        return None
    model = open_llama(folder, dtype)
    if model is None or why_not_fused(model, kind) is not None:
        return None
    needs = [replace(layer, block_size=block_size) for layer in model.needs()]
    return Loaded(model, needs, None) if NativeAttention().why_not(needs[0]) is None else None


def _open_for_gpu(folder: ModelFolder, dtype: str, device: torch.device, block_size: int) -> Loaded | None:
    """None as above. The weights stay mapped until they are merged on the device: they are never there twice."""
    model = open_llama(folder, dtype, device)
    if model is None or why_not_gpu_llama(model) is not None:
        return None
    needs = [replace(layer, block_size=block_size) for layer in model.needs()]
    return Loaded(model, needs, None) if TritonAttention().why_not(needs[0]) is None else None
