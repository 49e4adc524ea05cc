"""The Llama family's forward in one call of the C++ kernels, from the weights of the Transformers model.

Llama, Mistral, Qwen2, Qwen3 and whatever else is built of the same parts: RMSNorm, rotary embedding, grouped-query
attention, a gated SiLU MLP. `why_not` looks at the modules, not at names, so a model that only resembles them is left
to its own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from executor.attention.native import attention_struct
from executor.attention.protocol import LayerNeeds
from executor.batch import InputBatch
from executor.kv_cache import KvCache
from executor.native.library import INT4, INT8, KINDS, LlamaLayerStruct, LlamaStruct, Native
from executor.native.packed import PackedLinear, Pages, interleaved, merge, pack
from executor.native.packed import why_not as why_not_packed
from executor.native.step import step_struct

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from executor.llama_folder import FolderLlama

_KEPT_ROWS: Final = 256  # of logits, from step to step

# By name: to import them takes seconds.
_FAMILY: Final = frozenset({
    "executor.llama_folder.FolderLlama",
    "transformers.models.llama.modeling_llama.LlamaForCausalLM",
    "transformers.models.mistral.modeling_mistral.MistralForCausalLM",
    "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM",
    "transformers.models.qwen3.modeling_qwen3.Qwen3ForCausalLM",
    "transformers.models.smollm3.modeling_smollm3.SmolLM3ForCausalLM",
})  # fmt: skip


def is_of_the_family(model: PreTrainedModel | FolderLlama) -> bool:
    """Whether the model is one whose forward is known here."""
    return f"{type(model).__module__}.{type(model).__qualname__}" in _FAMILY


def why_not(model: PreTrainedModel | FolderLlama, kind: int | None = None) -> str | None:
    """Return why this model cannot take the fused forward, with weights of `kind`, or None when it can."""
    config = model.config
    if not is_of_the_family(model):
        return f"{type(model).__name__} is not of the Llama family"
    if model.device.type != "cpu" or model.dtype not in KINDS:
        return f"{model.dtype} on {model.device.type}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    if config.intermediate_size % 16:
        return f"intermediate size {config.intermediate_size} is no multiple of 16"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % 16:
        return f"head dimension {head_dim} is no multiple of 16"
    kind = KINDS[model.dtype] if kind is None else kind
    widths = (config.hidden_size, config.num_attention_heads * head_dim, config.intermediate_size)
    return next(filter(None, (why_not_packed(width, kind) for width in widths)), None)


class LlamaModel:
    """A model of the family over a packed KV slab. Owns its weights; the Transformers model may go afterwards."""

    def __init__(
        self,
        native: Native,
        model: PreTrainedModel | FolderLlama,
        cache: KvCache,
        needs: list[LayerNeeds],
        *,
        max_positions: int,
        kind: int | None = None,
    ) -> None:
        self._native = native
        self._pages = Pages()
        self._kept: list[Any] = [cache]
        self._kind = kind
        body: Any = model.model
        lm_head: Any = model.lm_head
        config = model.config
        embedding = body.embed_tokens.weight.detach()
        cos, sin = rotary_tables(body.rotary_emb, max_positions)
        layers = (LlamaLayerStruct * len(body.layers))()
        for index, layer in enumerate(body.layers):
            layers[index] = self._layer(layer, cache, needs[index], index)
            forget(layer)  # a copy of the weights at a time, not two of all
        self.vocab_size = int(config.vocab_size)
        self._model = LlamaStruct(
            num_layers=len(layers),
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocab=self.vocab_size,
            rotary_dim=cos.shape[1] * 2,
            epsilon=config.rms_norm_eps,
            embedding_kind=KINDS[embedding.dtype],
            embedding=embedding.data_ptr(),
            cos=self._keep(cos),
            sin=self._keep(sin),
            final_norm=self._norm(body.norm),
            layers=layers,
            head=self._pack([lm_head], INT8 if kind == INT4 else kind).struct,  # the answer hangs on it most
        )
        self._kept += [embedding, layers]
        self._logits = torch.empty(0, self.vocab_size)
        self.hidden: Tensor | None = None  # (E, hidden) float32, of the rows of a batch that embed

    def forward(self, batch: InputBatch, token_ids: Tensor) -> Tensor:
        """Compute every token of the batch; return logits (S, vocab_size) float32, void at the next call.

        `token_ids` (T,) int64.
        """
        num_sampled = len(batch.logits_indices)
        if num_sampled > _KEPT_ROWS:  # a long prompt is scored: that memory is not kept
            logits = torch.empty(num_sampled, self.vocab_size)
        else:
            if num_sampled > len(self._logits):
                self._logits = torch.empty(num_sampled, self.vocab_size)
            logits = self._logits[:num_sampled]
        normed = torch.empty(num_sampled, self._model.hidden) if len(batch.embedded_rows) else None
        self._native.llama_forward(self._model, step_struct(batch, token_ids), logits, normed)
        self.hidden = None if normed is None else normed[torch.from_numpy(batch.embedded_rows)]
        return logits

    def _layer(self, layer: Any, cache: KvCache, needs: LayerNeeds, index: int) -> LlamaLayerStruct:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = self._pack([attention.q_proj, attention.k_proj, attention.v_proj], self._kind)
        order = interleaved(len(mlp.gate_proj.weight))
        return LlamaLayerStruct(
            qkv=qkv.struct,
            o=self._pack([attention.o_proj], self._kind).struct,
            gate_up=self._pack([mlp.gate_proj, mlp.up_proj], self._kind, order).struct,
            down=self._pack([mlp.down_proj], self._kind).struct,
            input_norm=self._norm(layer.input_layernorm),
            post_norm=self._norm(layer.post_attention_layernorm),
            q_norm=self._norm(getattr(attention, "q_norm", None)),
            k_norm=self._norm(getattr(attention, "k_norm", None)),
            rotary=int(getattr(attention, "use_rope", True)),
            attention=attention_struct(cache.layers[index], needs.shape, scale=attention.scaling, window=needs.window),
        )

    def _pack(self, linears: list[nn.Linear], kind: int | None, row_of: Tensor | None = None) -> PackedLinear:
        weight, bias = merge([(each.weight, each.bias) for each in linears])
        packed = pack(self._native, self._pages, weight, bias, kind=kind, row_of=row_of)
        self._kept.append(packed)
        return packed

    def _norm(self, module: Any) -> int | None:
        return None if module is None else self._keep(module.weight.detach().to(torch.float32, copy=True))

    def _keep(self, tensor: Tensor) -> int:
        dense = tensor.contiguous()
        self._kept.append(dense)
        return dense.data_ptr()


def rotary_tables(rotary: nn.Module, max_positions: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cos and sin (max_positions, rotary_dim / 2) float32, by the model's own code, on its device."""
    with torch.inference_mode():
        positions = torch.arange(max_positions, device=device)[None]
        cos, sin = rotary(torch.zeros(1, 1, dtype=torch.float32, device=device), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].clone(), sin[0, :, :half].clone()


def forget(layer: nn.Module) -> None:
    """Let the weights of a layer that is packed go."""
    parameters: Mapping[str, nn.Parameter] = dict(layer.named_parameters())
    for parameter in parameters.values():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
