"""A Llama folder to the fused forward's weights without Transformers, whose import takes longer than all the rest.

Only what is Llama to the letter: every tensor that the configuration calls for and no other, ordinary rotary embedding.
`open_llama` returns None for anything else, and Transformers loads that; it also words the errors. That both ways give
the same logits, bit for bit, is tested. The weights are mapped, not read: packing them is the first that touches them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.json_value import is_natural
from common.model_folder import ModelFolder
from executor.attention.protocol import LayerNeeds
from executor.kv_cache import LayerShape

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU: Final = torch.device("cpu")
_ROPE_KEYS: Final = {"rope_type", "rope_theta"}
_INT_KEYS: Final = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


class Tree(nn.Module):
    """Tensors by their dotted names, as attributes: `tree.model.layers[0].mlp.up_proj.weight`. No forward."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Place a tensor, and what is missing on the way to it."""
        head, _, rest = name.partition(".")
        if not rest:
            self.register_parameter(head, nn.Parameter(tensor, requires_grad=False))
            if "bias" not in self._parameters:
                self.register_parameter("bias", None)
            return
        if head not in self._modules:
            self.add_module(head, Tree())
        child = self._modules[head]
        assert isinstance(child, Tree)
        child.put(rest, tensor)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module | None]:
        return iter(self._modules[str(n)] for n in range(len(self)))


class Rotary(nn.Module):
    """The ordinary rotary embedding (Su et al., 2021), as Transformers' LlamaRotaryEmbedding computes it."""

    def __init__(self, dim: int, theta: float, device: torch.device) -> None:
        super().__init__()
        inverse = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
        self._inverse = inverse.to(device)

    def forward(self, _: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin (1, T, dim) of `positions` (1, T)."""
        angles = torch.outer(positions[0].float(), self._inverse)
        angles = torch.cat([angles, angles], dim=1)[None]
        return angles.cos(), angles.sin()


class FolderLlama(Tree):
    """What a fused forward reads of a LlamaForCausalLM: weights, configuration, rotary embedding.

    Its device is the one on which it is to compute: the weights stay where they are mapped until they are taken.
    """

    def __init__(self, config: SimpleNamespace, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.device = device

    def needs(self) -> list[LayerNeeds]:
        """What each layer asks of its attention."""
        config = self.config
        shape = LayerShape(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            key_dim=config.head_dim,
            value_dim=config.head_dim,
        )
        return [LayerNeeds(shape=shape, dtype=self.dtype, device=self.device)] * config.num_hidden_layers


def open_llama(folder: ModelFolder, dtype: str, device: torch.device = _CPU) -> FolderLlama | None:
    """Return the model for `device`, its weights mapped, or None when it takes Transformers to load it.

    `dtype` as in load_model.
    """
    config = _config(folder)
    if config is None:
        return None
    wanted = str(config.dtype) if dtype == "auto" else dtype
    if wanted not in _DTYPES or (wanted == "float16" and device.type == "cpu"):
        return None
    model = FolderLlama(config, _DTYPES[wanted], device)
    missing = _tensor_shapes(config)
    try:
        for file in folder.weight_files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    tensor = tensors.get_tensor(name)
                    if missing.pop(name, None) != tuple(tensor.shape) or not tensor.is_floating_point():
                        return None
                    # the table is read for ever; a copy of its own lets the mapping of all the others go
                    own = device.type == "cpu" and name == "model.embed_tokens.weight"
                    model.put(name, tensor.to(model.dtype, copy=own))
    except (OSError, SafetensorError):
        return None
    if missing:
        return None
    body: Any = model.model
    if config.tied:
        model.put("lm_head.weight", body.embed_tokens.weight.data)
    for layer in body.layers:
        layer.self_attn.scaling = config.head_dim**-0.5
    body.rotary_emb = Rotary(config.head_dim, config.rope_theta, device)
    return model


def _config(folder: ModelFolder) -> SimpleNamespace | None:
    """What matters of config.json, or None when anything in it is out of the ordinary."""
    raw: Mapping[str, Any] = json.loads((folder.path / "config.json").read_bytes())
    if raw.get("architectures") != ["LlamaForCausalLM"] or raw.get("model_type") != "llama":
        return None
    if raw.get("hidden_act", "silu") != "silu" or raw.get("quantization_config") or raw.get("rope_scaling"):
        return None
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or len(rope.keys() - _ROPE_KEYS):
        return None
    if not all(is_natural(raw.get(key)) and raw[key] > 0 for key in _INT_KEYS):
        return None
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    kv_heads, head_dim = raw.get("num_key_value_heads") or heads, raw.get("head_dim") or hidden // heads
    if not is_natural(kv_heads) or not is_natural(head_dim) or heads % kv_heads or hidden % heads:
        return None
    epsilon, theta = raw.get("rms_norm_eps", 1e-6), rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    if not isinstance(epsilon, float) or not isinstance(theta, float | int):
        return None
    return SimpleNamespace(
        **{key: raw[key] for key in _INT_KEYS},
        hidden_act="silu",
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=epsilon,
        rope_theta=float(theta),
        dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
        tied=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _tensor_shapes(config: SimpleNamespace) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that such a model has."""
    hidden, wide, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (queries, hidden, config.attention_bias),
        "self_attn.k_proj": (keys, hidden, config.attention_bias),
        "self_attn.v_proj": (keys, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, queries, config.attention_bias),
        "mlp.gate_proj": (wide, hidden, config.mlp_bias),
        "mlp.up_proj": (wide, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, wide, config.mlp_bias),
    }
    for n in range(config.num_hidden_layers):
        prefix = f"model.layers.{n}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        for name, (outputs, inputs, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
    return shapes
