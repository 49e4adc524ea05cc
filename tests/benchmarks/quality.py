"""What fewer bits do to a model's answers: `make bench-quality`.

One text, read by the same model in several precisions through the forward that serves it: in chunks, over a paged KV
cache. After each token the perplexity counts how surprised the model was by the next one, and its logits are compared
with those of float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from common.config import DEFAULT_MODEL
from common.model_folder import read_model_folder
from executor.attention import choose
from executor.batch import InputBatch
from executor.kv_cache import KvCache, SlabFormat
from executor.llama import LlamaModel
from executor.llama import why_not as why_not_fused
from executor.native.library import INT4, INT8, native
from executor.paged_model import PagedModel, probe_layers
from executor.swap import swap
from executor.weights import load_model
from services.model_store import resolve

TEXT: Final = Path(__file__).parent / "text.txt"
BLOCK_SIZE: Final = 16
CHUNK: Final = 256  # tokens of a step
CPU: Final = torch.device("cpu")
_MIXED: Final = "LlamaForCausalLM"  # what mix_inputs knows


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How weights and KV are held."""

    name: str
    dtype: str = "bfloat16"
    weights: int | None = None  # a kind of the kernels; the dtype's own unless said
    kv: torch.dtype | None = None  # the dtype's own unless said
    mixes: bool = False  # the order of inputs first, see mix_inputs


FLOAT32: Final = Precision(name="float32", dtype="float32")
BFLOAT16: Final = Precision(name="bfloat16")
INT8_WEIGHTS: Final = Precision(name="int8", weights=INT8)
INT4_WEIGHTS: Final = Precision(name="int4", weights=INT4)
INT4_MIXED: Final = Precision(name="int4, inputs mixed", weights=INT4, mixes=True)
INT8_KV: Final = Precision(name="bfloat16, int8 KV", kv=torch.int8)
INT8_BOTH: Final = Precision(name="int8, int8 KV", weights=INT8, kv=torch.int8)
ALL: Final = (FLOAT32, BFLOAT16, INT8_WEIGHTS, INT4_WEIGHTS, INT4_MIXED, INT8_KV, INT8_BOTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How one precision read a text, beside the first one."""

    name: str
    perplexity: float
    agreement: float  # share of tokens after which the likeliest next one is the same
    divergence: float  # mean Kullback-Leibler divergence from the first, in nats a token
    logit_error: float  # mean over tokens and vocabulary


class Reader:
    """A model that reads one text from its beginning."""

    def __init__(self, folder: Path, precision: Precision, num_tokens: int) -> None:
        model = load_model(folder, dtype=precision.dtype, device=CPU)
        vocab_size = int(model.config.get_text_config().vocab_size)
        if precision.mixes:
            mix_inputs(model)
        needs = [replace(layer, block_size=BLOCK_SIZE) for layer in probe_layers(model, vocab_size)]
        backends = choose(needs)
        self._tables = np.arange(-(-num_tokens // BLOCK_SIZE), dtype=np.int32)[None]
        cache = KvCache(
            [layer.shape for layer in needs],
            num_blocks=self._tables.size,
            block_size=BLOCK_SIZE,
            format=SlabFormat(dtype=precision.kv or model.dtype, packed=backends[0].packed),
            device=CPU,
        )
        self._model: LlamaModel | PagedModel
        if backends[0].packed and why_not_fused(model, precision.weights) is None:
            self._model = LlamaModel(native(), model, cache, needs, max_positions=num_tokens, kind=precision.weights)
        else:
            swap(model, precision.weights)
            self._model = PagedModel(model, cache, backends)
        self._num_read = 0

    def read(self, token_ids: Sequence[int]) -> Tensor:
        """Logits (tokens, vocab_size) float32 after each of the next tokens of the text."""
        first, self._num_read = self._num_read, self._num_read + len(token_ids)
        positions = np.arange(first, self._num_read)
        nothing = np.zeros(0, np.int64)
        batch = InputBatch(
            token_places=nothing,
            positions=positions,
            slot_mapping=positions,  # its blocks lie in order
            query_start_loc=np.array([0, len(token_ids)]),
            seq_lens=np.array([self._num_read]),
            block_tables=self._tables,
            num_decodes=int(len(token_ids) == 1),
            logits_indices=np.arange(len(token_ids)),
            sampled_slots=nothing,
            sampled_places=nothing,
            sampled_indices=nothing,
        )
        return self._model.forward(batch, torch.tensor(token_ids)).float()


def compare(folder: Path, token_ids: Sequence[int], precisions: Sequence[Precision]) -> list[Quality]:
    """Let the model read a text in each precision; the first is the one that others are compared with."""
    readers = [Reader(folder, precision, len(token_ids)) for precision in precisions]
    sums = torch.zeros(len(readers), 4, dtype=torch.float64)
    for start in range(0, len(token_ids) - 1, CHUNK):
        given = token_ids[start : start + CHUNK]
        following = torch.tensor(token_ids[start + 1 : start + 1 + CHUNK])[:, None]
        first: Tensor | None = None
        for row, reader in enumerate(readers):
            logits = reader.read(given)[: len(following)]
            if first is None:
                first = logits.clone()
            sums[row] += _sums(logits, first, following)
    perplexity, agreement, divergence, error = (sums / (len(token_ids) - 1)).T.tolist()
    return [
        Quality(
            name=precision.name,
            perplexity=math.exp(perplexity[row]),
            agreement=agreement[row],
            divergence=divergence[row],
            logit_error=error[row],
        )
        for row, precision in enumerate(precisions)
    ]


def _sums(logits: Tensor, first: Tensor, following: Tensor) -> Tensor:
    """Over the tokens: surprise, agreement, divergence, error of logits."""
    mine, theirs = logits.log_softmax(-1), first.log_softmax(-1)
    surprise = -mine.gather(1, following)
    agree = logits.max(-1).indices == first.max(-1).indices
    divergence = (theirs.exp() * (theirs - mine)).sum(-1)
    error = (logits - first).abs().mean(-1)
    return torch.stack([each.double().sum() for each in (surprise, agree, divergence, error)])


def mix_inputs(model: PreTrainedModel) -> None:
    """Put a Llama's hidden and inner numbers into another order: the same model, but for which weights share a scale.

    A model whose weights come from a 4-bit file has groups that fit 4 bits by birth, which says little of others.
    """
    body: Any = model.model
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(model.config.hidden_size, generator=random)
    embedding = body.embed_tokens.weight
    embedding.data = embedding.data[:, order]
    if model.lm_head.weight is not embedding:
        model.lm_head.weight.data = model.lm_head.weight.data[:, order]
    body.norm.weight.data = body.norm.weight.data[order]
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inner = torch.randperm(mlp.down_proj.in_features, generator=random)
        heads = _within_heads(attention, random)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = norm.weight.data[order]
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.data = linear.weight.data[:, order]
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.data = linear.weight.data[inner]
        attention.v_proj.weight.data = attention.v_proj.weight.data[heads[: attention.v_proj.out_features]]
        attention.o_proj.weight.data = attention.o_proj.weight.data[order][:, heads]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[order][:, inner]


def _within_heads(attention: Any, random: torch.Generator) -> Tensor:
    """One order of the numbers of a head, for each of the heads."""
    inputs, dim = attention.o_proj.in_features, attention.head_dim
    one = torch.randperm(dim, generator=random)
    return (torch.arange(0, inputs, dim)[:, None] + one).view(-1)


def table(found: Sequence[Quality]) -> str:
    """Markdown."""
    lines = [
        f"| | perplexity | against {found[0].name} | same likeliest token | divergence (nats) | mean logit error |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.name} | {each.perplexity:.3f} | {each.perplexity / found[0].perplexity - 1:+.2%} "
        f"| {each.agreement:.1%} | {each.divergence:.5f} | {each.logit_error:.4f} |"
        for each in found
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a folder, or a name that `pagewire serve` knows")
    parser.add_argument("--text", type=Path, default=TEXT)
    told = parser.parse_args()
    folder = resolve(told.model)
    precisions = [each for each in ALL if not each.mixes or read_model_folder(folder).architecture == _MIXED]
    token_ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(told.text.read_text(encoding="utf-8")).ids
    print(table(compare(folder, token_ids, precisions)))
    print(f"\n{len(token_ids)} tokens, in steps of {CHUNK}; {native().isa}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
