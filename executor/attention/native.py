"""Paged attention by the C++ kernels (executor/native/csrc/attention.h): the default on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from executor.attention.protocol import AttentionStep, LayerNeeds, LayerOptions
from executor.kv_cache import LayerCache, LayerShape
from executor.native.library import BFLOAT16, FLOAT32, INT8, KINDS, AttentionStruct, NativeMissing, StepStruct, native
from executor.native.step import step_struct

_KV_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}
_MAX_DIM = 512


class NativeAttention:
    """Any group size, window, soft cap and sinks, over packed K and V of float32, bfloat16 or int8."""

    name = "native"
    packed = True

    def why_not(self, layer: LayerNeeds, /) -> str | None:
        """Head dimensions are worked in lanes of 16, on the CPU, in the dtypes that the kernels know."""
        if layer.device.type != "cpu":
            return f"it is for the CPU, not for {layer.device.type}"
        if layer.dtype not in KINDS:
            return str(layer.dtype)
        if layer.kv_dtype is not None:
            return f"K and V in {layer.kv_dtype}"
        if layer.shape.key_dim % 16 or layer.shape.value_dim % 16:
            return f"head dimensions {layer.shape.key_dim} and {layer.shape.value_dim} are no multiples of 16"
        if max(layer.shape.key_dim, layer.shape.value_dim) > _MAX_DIM:
            return f"head dimension above {_MAX_DIM}"
        if layer.block_size % 16:
            return f"block size {layer.block_size} is no multiple of 16"
        try:
            native()
        except NativeMissing as missing:
            return str(missing)
        return None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: LayerCache,
        step: AttentionStep,
        options: LayerOptions,
    ) -> Tensor:
        """Store, then attend. Shapes as in AttentionBackend."""
        num_tokens, num_heads, key_dim = query.shape
        shape = LayerShape(num_heads=num_heads, num_kv_heads=key.shape[1], key_dim=key_dim, value_dim=value.shape[2])
        sinks = None if options.sinks is None else options.sinks.detach().float().contiguous()
        out = query.new_empty(num_tokens, num_heads, shape.value_dim)
        layer = attention_struct(
            cache, shape, scale=options.scale, window=options.window, softcap=options.softcap, sinks=sinks
        )
        layout = step.memo.get("native")
        if layout is None:
            layout = step.memo["native"] = step_struct(step.batch)
        assert isinstance(layout, StepStruct)
        native().attention(layer, layout, _dense(query), _dense(key), _dense(value), out.view(num_tokens, -1))
        return out


def attention_struct(
    cache: LayerCache,
    shape: LayerShape,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> AttentionStruct:
    """One layer for the kernels. It points into `cache` and `sinks` (float32), which must live as long."""
    return AttentionStruct(
        kv_kind=_KV_KINDS[cache.format.dtype],
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
        block_size=cache.block_size,
        window=window or 0,
        scale=scale,
        softcap=softcap or 0.0,
        sinks=None if sinks is None else sinks.data_ptr(),
        keys=cache.keys.data_ptr(),
        values=cache.values.data_ptr(),
    )


def _dense(x: Tensor) -> Tensor:
    """`x` itself if its last axis is dense, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
