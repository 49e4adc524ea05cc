"""A Hugging Face folder to a model whose attention is ours. No code from the folder is ever run.

The architecture's own Transformers code does everything but attention: it calls the function registered here, which
hands each call to whatever answers it at the time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_accelerate_available

from common.errors import ModelFolderError
from executor.attention.protocol import LayerOptions

ATTENTION: Final = "pagewire"
_SERVED_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
# These choose their frequencies by the longest position of the batch: beyond the original length a row would depend
# on its company.
_LENGTH_DEPENDENT_ROPE: Final = frozenset({"dynamic", "longrope"})
# What architectures raise that never heard of our attention, and loaders of files that are not what they seem.
_LOAD_ERRORS: Final = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError,
)  # fmt: skip
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PagedCalls(Protocol):
    """Where the model's attention calls go."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions) -> Tensor:
        """Attend in `layer`; shapes as in AttentionBackend."""
        ...


_calls: ContextVar[PagedCalls] = ContextVar("the forward that runs")


@contextmanager
def answering(calls: PagedCalls) -> Iterator[None]:
    """Send every attention call of the models that run inside to `calls`.

    Not an argument of the forward: some architectures drop arguments that they do not know.
    """
    before = _calls.set(calls)
    try:
        yield
    finally:
        _calls.reset(before)


def load_model(folder: Path, *, dtype: str, device: torch.device, has_head: bool = True) -> PreTrainedModel:
    """Load weights and architecture. `dtype` is auto (the folder's own), float32, bfloat16 or float16.

    A model without a head makes vectors alone: it is given the token embeddings for one, and its logits mean nothing.

    Raises ModelFolderError when files are missing or do not fit, or the architecture cannot be served by paged
    attention.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # loaded by this thread alone: a second thread that computes would slow every later step
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    config = _read_config(folder)
    _check_config(config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its types do not say
            folder,
            config=config,
            dtype=_resolve_dtype(dtype, config, device),
            attn_implementation=ATTENTION,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **_placement(device),
        )
    except _LOAD_ERRORS as error:
        problem = f"{type(error).__name__}: {error}"
        raise ModelFolderError(f"{folder}: {_architecture(config)} cannot be served: {problem}") from error
    model, loading = loaded
    if not has_head:
        loading = _with_any_head(model, loading)
    _check_weights(folder, loading)
    if getattr(model, "_is_stateful", False):
        raise ModelFolderError(f"{_architecture(config)} keeps recurrent state, which a KV cache does not hold")
    model.requires_grad_(requires_grad=False)
    placed: PreTrainedModel = model.eval().to(device)
    return placed


def _placement(device: torch.device) -> dict[str, Any]:
    """How weights get to a device as they are read, one by one, without a copy of all of them before.

    Transformers does it through accelerate; without that, they are mapped and then moved.
    """
    return {"device_map": {"": device}} if device.type != "cpu" and is_accelerate_available() else {}


def max_positions(config: PretrainedConfig) -> int | None:
    """Length up to which a token's rotary embedding depends on its position alone, or None where it always does."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for each in [rope, *(part for part in rope.values() if isinstance(part, Mapping))]:
        if each.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original = each.get("original_max_position_embeddings")
            limits.append(int(original or getattr(config, "original_max_position_embeddings", 0) or 0))
            if not limits[-1]:
                limits[-1] = int(config.max_position_embeddings)
    return min(limits, default=None)


def _read_config(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFolderError(f"{folder}/config.json is of a kind that Transformers does not know: {error}") from error
    assert isinstance(config, PretrainedConfig)
    return config


def _check_config(config: PretrainedConfig) -> None:
    """Refuse what can be known to fail before gigabytes are read."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelFolderError(f"{_architecture(config)} is an encoder and decoder; only decoders are served")
    unknown = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYER_TYPES
    if unknown:
        raise ModelFolderError(f"{_architecture(config)} has layers that are not served: {', '.join(sorted(unknown))}")


def _with_any_head(model: Any, loading: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was loaded, with the token embeddings for the output matrix that is missing."""
    head = model.get_output_embeddings()
    name = next((f"{name}.weight" for name, module in model.named_modules() if module is head), "")
    missing = set(loading.get("missing_keys", ()))
    if name in missing and head.weight.shape == model.get_input_embeddings().weight.shape:
        head.weight = model.get_input_embeddings().weight
        missing.discard(name)
    return {**loading, "missing_keys": missing}


def _check_weights(folder: Path, loading: Mapping[str, Any]) -> None:
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(str(key) for key in loading.get(kind, ())):
            rest = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ModelFolderError(f"{folder}: the weights do not fit the architecture: {kind}: {found[0]}{rest}")


def _resolve_dtype(name: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    if name == "auto":
        own = getattr(config, "dtype", None) or torch.float32
        # half precision is slow on a CPU, and bfloat16 would lose three of its bits
        return torch.float32 if own is torch.float16 and device.type == "cpu" else own
    if name not in _DTYPES:
        raise ModelFolderError(f"dtype must be one of auto, {', '.join(_DTYPES)}; got {name!r}")
    return _DTYPES[name]


def _architecture(config: PretrainedConfig) -> str:
    return next(iter(config.architectures or ()), config.model_type)


def _attention(
    module: nn.Module,
    query: Tensor,  # (1, num_heads, T, key_dim)
    key: Tensor,  # (1, num_kv_heads, T, key_dim)
    value: Tensor,  # (1, num_kv_heads, T, value_dim)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """What Transformers calls in each layer; returns (1, T, num_heads, value_dim) and no attention weights."""
    name = type(module).__name__
    if attention_mask is not None or position_bias is not None:
        raise ModelFolderError(f"{name} brings a mask or a bias of its own, which paged attention does not know")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ModelFolderError(f"{name} looks at later tokens; only causal models are served")
    options = LayerOptions(
        scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window or None,
        softcap=softcap or None,
        sinks=s_aux,
    )
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ModelFolderError(f"{name} does not say which layer it is")
    out = _calls.get().attend(
        layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), options
    )
    return out[None], None


AttentionInterface.register(ATTENTION, _attention)
