"""The models whose shapes are measured, with random weights, and tiny ones for a check without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from tests.benchmarks.floors import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model without its weights."""

    name: str
    kind: Literal["qwen3", "llama"]
    size: ModelShape
    tied: bool  # the matrix that makes logits is the embedding
    rope_theta: float
    epsilon: float
    max_positions: int

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says of it, in the words that Transformers 4 and other engines read as well."""
        size = self.size
        return {
            "architectures": ["Qwen3ForCausalLM" if self.kind == "qwen3" else "LlamaForCausalLM"],
            "model_type": self.kind,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": size.head_dim,
            "vocab_size": size.vocabulary,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    @property
    def kv_token_bytes(self) -> int:
        """Of K and V of one token, over all layers, in bfloat16."""
        return 4 * self.size.layers * self.size.kv_heads * self.size.head_dim


QWEN3_0_6B: Final = Shape(
    name="Qwen3-0.6B",
    kind="qwen3",
    size=ModelShape(layers=28, hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128, vocabulary=151_936),
    tied=True,
    rope_theta=1e6,
    epsilon=1e-6,
    max_positions=40_960,
)
LLAMA_3_8B: Final = Shape(
    name="Llama-3-8B",
    kind="llama",
    size=ModelShape(
        layers=32, hidden=4096, intermediate=14_336, heads=32, kv_heads=8, head_dim=128, vocabulary=128_256
    ),
    tied=False,
    rope_theta=5e5,
    epsilon=1e-5,
    max_positions=8192,
)
TINY_QWEN3: Final = Shape(
    name="tiny Qwen3",
    kind="qwen3",
    size=ModelShape(layers=1, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocabulary=384),
    tied=True,
    rope_theta=1e6,
    epsilon=1e-6,
    max_positions=256,
)
TINY_LLAMA: Final = Shape(
    name="tiny Llama",
    kind="llama",
    size=ModelShape(layers=1, hidden=64, intermediate=96, heads=4, kv_heads=1, head_dim=16, vocabulary=384),
    tied=False,
    rope_theta=5e5,
    epsilon=1e-5,
    max_positions=256,
)


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype, *, spread: float = 0.02) -> Any:
    """A Transformers model whose matrices are drawn from N(0, spread), made where it is used; its attention is ours.

    Never zeros: a multiplier that has nothing to do draws less power, and the clock goes up.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - seconds

    from executor.weights import ATTENTION  # noqa: PLC0415

    fields = {key: value for key, value in shape.config.items() if key not in {"architectures", "model_type"}}
    config = AutoConfig.for_model(shape.kind, **fields, pad_token_id=None)
    config.initializer_range = spread
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    return model.eval().requires_grad_(requires_grad=False)
