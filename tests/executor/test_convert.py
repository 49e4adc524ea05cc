"""A GGUF file becomes a folder that holds the same model, or nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from common.model_folder import read_model_folder
from executor.convert import main

HIDDEN, VOCAB, KV_HEADS, HEADS, INNER = 32, 512, 2, 4, 64
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
LETTERS = [chr(letter) for letter in PRINTABLE] + [chr(letter) for letter in range(256, 256 + 256 - len(PRINTABLE))]


def write_gguf(file: Path, *, pre: str = "smollm") -> dict[str, np.ndarray]:
    """A Llama of one layer with random weights, as llama.cpp writes it; returns its tensors."""
    generator = np.random.default_rng(0)
    tokens = ["<|end|>", *LETTERS, "ĠĠ", "ĠĠĠ"]
    tokens += [f"filler{index}" for index in range(len(tokens), VOCAB)]
    writer = GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (VOCAB - 1)])
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "output": (VOCAB, HIDDEN),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    tensors = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_becomes_a_folder_with_its_weights_in_bfloat16(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")

    assert main([str(tmp_path / "tiny.gguf"), str(tmp_path / "tiny")]) == 0

    folder = read_model_folder(tmp_path / "tiny")
    assert (folder.architecture, folder.vocab_size, folder.max_model_len) == ("LlamaForCausalLM", VOCAB, 128)
    assert folder.eos_token_ids == (0,)
    assert folder.has_chat_template
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for theirs, ours in (
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
    ):
        assert torch.equal(weights[f"{theirs}.weight"], torch.from_numpy(tensors[ours]).bfloat16())


def test_digits_are_cut_as_the_vocabulary_was_learned(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre="smollm")
    write_gguf(tmp_path / "gpt2.gguf", pre="gpt-2")
    for name in ("tiny", "gpt2"):
        assert main([str(tmp_path / f"{name}.gguf"), str(tmp_path / name)]) == 0
    tiny, gpt2 = (Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("tiny", "gpt2"))

    assert tiny.encode("a   12").tokens == ["a", "ĠĠĠ", "1", "2"]
    assert gpt2.encode("a   12").tokens == ["a", "ĠĠ", "Ġ", "1", "2"]


def test_a_way_of_cutting_words_that_is_not_known_is_said(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre="novel")

    with pytest.warns(UserWarning, match=r"tiny\.gguf: how its tokenizer \(novel\) cuts words is not known"):
        assert main([str(tmp_path / "tiny.gguf"), str(tmp_path / "tiny")]) == 0


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16])
def test_a_file_that_is_no_model_leaves_one_line_and_no_folder(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)

    assert main([str(tmp_path / "broken.gguf"), str(tmp_path / "model")]) == 1

    assert capsys.readouterr().err.startswith(str(tmp_path / "broken.gguf"))
    assert [file.name for file in tmp_path.iterdir()] == ["broken.gguf"]


def test_a_folder_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()

    assert main([str(tmp_path / "any.gguf"), str(tmp_path / "model")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_the_default_model_is_whole(default_model: Path) -> None:
    folder = read_model_folder(default_model)
    tokenizer = Tokenizer.from_file(str(default_model / "tokenizer.json"))
    model: Any = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)

    assert (folder.name, folder.vocab_size, folder.max_model_len) == ("SmolLM2-135M-Instruct", 49152, 8192)
    assert folder.eos_token_ids == (tokenizer.token_to_id("<|im_end|>"),)
    assert tokenizer.encode("x =   12").tokens == ["x", "Ġ=", "ĠĠĠ", "1", "2"]
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    assert "Paris" in tokenizer.decode(output[0, ids.shape[1] :].tolist())
