"""Tiny random models of real architectures: a second to make, a folder like any other, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE: Final = 97
_COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDING: Final[dict[str, Any]] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: Final[dict[str, Any]] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GPT2: Final[dict[str, Any]] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_MLA: Final[dict[str, Any]] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}

TINY: Final[dict[str, dict[str, Any]]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16, "decoder_sparse_step": 1},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, **_SLIDING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **_SLIDING},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": {},
    "gpt_oss": {**_EXPERTS, "num_local_experts": 4, "head_dim": 16, **_SLIDING},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmoe": _EXPERTS,
    "starcoder2": {"sliding_window": 6},
    "cohere": {},
    "cohere2": {**_SLIDING, "head_dim": 16},
    "smollm3": {},
    "stablelm": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "exaone4": {**_SLIDING, "sliding_window_pattern": 2},
    "ernie4_5": {},
    "helium": {"head_dim": 16},
    "nemotron": {},
    "seed_oss": {"head_dim": 16},
    "arcee": {},
    "hunyuan_v1_dense": {"head_dim": 16},
    "ministral": {**_SLIDING, "head_dim": 16},
    "persimmon": {"num_key_value_heads": 4},
    "deepseek_v3": {
        **_MLA,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 48,
    },
    "minicpm3": {**_MLA, "head_dim": 24},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
}


def save_tiny(kind: str, folder: Path, **changes: Any) -> Path:
    """Write a random model of the kind into `folder`; the same weights every time."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **{**_COMMON, **TINY.get(kind, {}), **changes})
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)  # larger than at the start of training, so that logits differ clearly
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def load_plain(folder: Path) -> Any:
    """The model as Transformers itself runs it: its own eager attention, no cache of ours."""
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
