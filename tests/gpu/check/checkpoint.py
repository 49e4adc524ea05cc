"""A model folder with random weights, as Transformers writes one, so that every engine loads the same model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.gpu.check.shapes import QWEN3_0_6B, TINY_QWEN3, Shape

SPECIAL: Final = ("<|pad|>", "<|begin|>", "<|end|>")
_BYTE_SYMBOLS: Final = 256


def write_checkpoint(
    shape: Shape,
    folder: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    spread: float = 0.02,
) -> Path:
    """Write `folder`, or leave it if it is there; return it. Matrices are drawn from N(0, spread) on `device`."""
    done = folder / "generation_config.json"  # written last
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    kind = str(dtype).removeprefix("torch.")
    _write(folder / "config.json", {**shape.config, "torch_dtype": kind, "dtype": kind, "pad_token_id": 0})
    _write(folder / "tokenizer.json", tokenizer(shape.size.vocabulary))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": SPECIAL[0],
            "bos_token": SPECIAL[1],
            "eos_token": SPECIAL[2],
            "model_max_length": shape.max_positions,
            "clean_up_tokenization_spaces": False,
        },
    )
    draw = torch.Generator(device or torch.device("cpu")).manual_seed(0)
    weights = {name: _tensor(size, dtype, draw, spread) for name, size in _tensors(shape)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write(done, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    return folder


def model_folder(folder: Path, device: torch.device, *, fake: bool) -> Path:
    """The model that the stages share, inside of `folder`: Qwen3-0.6B's shape, or a tiny one."""
    shape = TINY_QWEN3 if fake else QWEN3_0_6B
    return write_checkpoint(shape, folder / shape.name.replace(" ", "-"), device=device)


def tokenizer(vocabulary: int) -> dict[str, Any]:
    """A byte-level one in which every id is a text: special tokens, bytes, then a space and a word each.

    It makes single bytes of a text, as it knows no merges; but it gives every token's text, and that takes as long as
    with any other.
    """
    assert vocabulary >= len(SPECIAL) + _BYTE_SYMBOLS, "each byte is a token"
    words = [*SPECIAL, *_byte_symbols()]
    words += [f"Ġ{_word(number)}" for number in range(vocabulary - len(words))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for id, text in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: id for id, word in enumerate(words)},
            "merges": [],
        },
    }


def _byte_symbols() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(_BYTE_SYMBOLS)]


def _word(number: int) -> str:
    """Three letters or more, another for each number."""
    letters = ""
    while number or len(letters) < 3:
        number, letter = divmod(number, 26)
        letters += chr(ord("a") + letter)
    return letters


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and size of each, as Transformers calls them."""
    size = shape.size
    attended, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    yield "model.embed_tokens.weight", (size.vocabulary, size.hidden)
    for index in range(size.layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (size.hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (attended, size.hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv, size.hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv, size.hidden)
        yield f"{layer}.self_attn.o_proj.weight", (size.hidden, attended)
        if shape.kind == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", (size.head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", (size.head_dim,)
        yield f"{layer}.post_attention_layernorm.weight", (size.hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (size.intermediate, size.hidden)
        yield f"{layer}.mlp.up_proj.weight", (size.intermediate, size.hidden)
        yield f"{layer}.mlp.down_proj.weight", (size.hidden, size.intermediate)
    yield "model.norm.weight", (size.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (size.vocabulary, size.hidden)


def _tensor(size: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator, spread: float) -> Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    return torch.empty(size, dtype=dtype, device=draw.device).normal_(0, spread, generator=draw).cpu()


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
