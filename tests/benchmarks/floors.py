"""The least time that a model needs on a machine, from the model's shape and what the machine was measured to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What is computed and read for a token by a model of the Llama family."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """From the folder's config.json; None for a model of another kind."""
        config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        try:
            return cls(
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                heads=config["num_attention_heads"],
                kv_heads=config["num_key_value_heads"],
                head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                vocabulary=config["vocab_size"],
            )
        except KeyError:
            return None

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the matrices of one layer: QKV, output, gate and up, down."""
        attended = self.heads * self.head_dim
        return [
            (self.hidden, attended + 2 * self.kv_heads * self.head_dim),
            (attended, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        ]

    @property
    def body_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def head_weights(self) -> int:
        """Numbers in the matrix that makes logits."""
        return self.hidden * self.vocabulary

    def decode_bytes(self, context: int, *, weight_bits: float, kv_bits: float) -> float:
        """Read from memory for one token of one stream that attends to `context` tokens."""
        kv_numbers = 2 * self.layers * self.kv_heads * self.head_dim * context
        return ((self.body_weights + self.head_weights) * weight_bits + kv_numbers * kv_bits) / 8

    def prefill_flop(self, length: int) -> float:
        """Operations up to the first token: every token through the layers, the last one through the head."""
        attention = 4 * self.layers * self.heads * self.head_dim * length * (length + 1) / 2
        return 2 * (self.body_weights * length + self.head_weights) + attention


def decode_floor_ms(
    shape: ModelShape, read_gb_s: float, *, prompt: int, output: int, weight_bits: float, kv_bits: float
) -> float:
    """Mean time of a token of one stream, were memory the only limit."""
    contexts = range(prompt + 1, prompt + output)
    read = sum(shape.decode_bytes(context, weight_bits=weight_bits, kv_bits=kv_bits) for context in contexts)
    return read / len(contexts) / read_gb_s / 1e6


def prefill_floor_ms(shape: ModelShape, matrix_gflop_s: float, length: int) -> float:
    """Time to the first token of a prompt, were matrix products the only limit."""
    return shape.prefill_flop(length) / matrix_gflop_s / 1e6
