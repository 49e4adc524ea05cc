"""A model folder without a model: a byte-level tokenizer, a chat template, and weights of 32 bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

VOCAB_SIZE = 320
MAX_MODEL_LEN = 512
EOS = 319
TOOL_CALL = 318  # a token that opens calls

# Tells of tools in a few bytes, each of which is a token, and writes calls as Hermes's templates do.
CHAT_TEMPLATE = """{% for t in tools or [] %}<|{{ t.function.name }}|>{% endfor %}\
{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\
{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def write(folder: Path) -> Path:
    """The folder, ready for a scheduler and for executors with --fake."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    vocab |= {f"filler{i}": i for i in range(len(alphabet), TOOL_CALL)} | {"<tool_call>": TOOL_CALL}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_MODEL_LEN,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    template = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    header = json.dumps({"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    return folder


def add_vectors(
    folder: Path,
    *,
    dimensions: int = 8,
    normalizes: bool = True,
    makes_text: bool = True,
    ends_texts: bool = False,
) -> Path:
    """Make the folder one in sentence-transformers' form. The fake runner makes vectors of 8 numbers.

    With `ends_texts` its tokenizer puts EOS behind each text.
    """
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalizes else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = {
        "word_embedding_dimension": dimensions,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True,
    }
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": makes_text}))
    if ends_texts:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", EOS)])
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder
