"""What a model is, read from its folder in milliseconds: no weights, no torch, no tokenizer.

Scheduler and executor read the folder each for itself; the digest tells whether they read the same model. A folder is
what Hugging Face Transformers saves: config.json, tokenizer.json and model.safetensors (or shards and their index);
tokenizer_config.json, generation_config.json and chat_template.jinja may be there too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from common.errors import ModelFolderError
from common.json_value import is_array, is_natural, is_object
from common.safetensors_header import MalformedSafetensors, SafetensorsHeader, read_safetensors_header
from common.sentence_folder import Embedding, read_embedding

MAX_JSON_BYTES: Final = 64 << 20
MAX_TOKENIZER_BYTES: Final = 512 << 20

# What the context length is called, in the order of trust. Long-context scaling beyond it is not guessed.
_CONTEXT_KEYS: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "n_ctx",
    "seq_length",
)
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_HEADS: Final = ("lm_head.weight", "embed_out.weight")  # what the matrix that makes logits is called


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model's facts. Nothing in here is configuration."""

    path: Path
    name: str  # what clients call it: the repository id in a Hugging Face cache, else the folder's name
    architecture: str  # the first of config.json's `architectures`
    vocab_size: int
    max_model_len: int  # tokens of one sequence, prompt and output together
    eos_token_ids: tuple[int, ...]  # generation_config.json's, else config.json's; ids outside the vocabulary left out
    bos_token_id: int | None
    chat_template: str | None  # Jinja source
    special_tokens: Mapping[str, str]  # "bos_token" → its text, and so on, as chat templates name them
    weight_files: tuple[Path, ...]
    digest: str  # hex; equal where config.json, tokenizer.json and the weights' headers and sizes are equal
    embedding: Embedding | str = ""  # the vector that it makes of a text, or why it makes none
    makes_text: bool = True  # False: it makes vectors, and has no matrix that makes logits

    @property
    def has_chat_template(self) -> bool:
        """True when the model can be talked to in messages."""
        return self.chat_template is not None


def read_model_folder(path: Path) -> ModelFolder:
    """Read and check a model folder.

    Raises ModelFolderError where a file is missing, truncated or malformed; its text names the file, the problem and
    what to type next.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        raise ModelFolderError(f"{path}: a GGUF file must be converted first. Type: pagewire pull {path}")
    if not path.is_dir():
        raise ModelFolderError(f"{path}: there is no such folder. Fetch the default model: pagewire pull smollm2")
    name = _model_name(path)
    config_bytes = _read_bytes(path / "config.json", name, MAX_JSON_BYTES)
    config = _parse_json(path / "config.json", name, config_bytes)
    text_config = _text_config(config)
    tokenizer = _read_tokenizer(path / "tokenizer.json", name)
    tokenizer_config = _read_optional_json(path / "tokenizer_config.json", name)
    generation_config = _read_optional_json(path / "generation_config.json", name)
    headers = _read_weight_headers(path, name)
    vocab_size = _positive(path, name, text_config, ("vocab_size",))
    embedding = read_embedding(path, text_config, tokenizer_config)
    return ModelFolder(
        path=path,
        name=name,
        architecture=_architecture(path, name, config),
        vocab_size=vocab_size,
        max_model_len=_positive(path, name, text_config, _CONTEXT_KEYS),
        eos_token_ids=_eos_token_ids(generation_config, config, text_config, vocab_size=vocab_size),
        bos_token_id=next(iter(_token_ids(text_config.get("bos_token_id"), vocab_size)), None),
        chat_template=_chat_template(path, name, tokenizer_config),
        special_tokens=_special_tokens(tokenizer_config),
        weight_files=tuple(path / file for file in headers),
        digest=_digest(config_bytes, tokenizer, headers),
        embedding=embedding,
        makes_text=isinstance(embedding, str) or _has_head(text_config, headers),
    )


def _refuse(file: Path, problem: str, name: str) -> NoReturn:
    if "/" in name:
        advice = f"Fetch it again: pagewire pull {name}"
    else:
        advice = "Save the model again with Transformers, or fetch the default model: pagewire pull smollm2"
    raise ModelFolderError(f"{file}: {problem}. {advice}")


def _model_name(path: Path) -> str:
    """A Hugging Face cache keeps a revision in models--OWNER--NAME/snapshots/REVISION."""
    resolved = path.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return resolved.name


def _read_bytes(file: Path, name: str, limit: int) -> bytes:
    if not file.is_file():  # also keeps us from waiting on a pipe of that name
        _refuse(file, "the file is missing", name)
    try:
        size = file.stat().st_size
        if size > limit:
            _refuse(file, f"the file has {size} bytes; at most {limit} are read", name)
        return file.read_bytes()
    except OSError as error:
        _refuse(file, f"the file cannot be read ({error.strerror})", name)


def _read_optional_json(file: Path, name: str) -> Mapping[str, object]:
    return _parse_json(file, name, _read_bytes(file, name, MAX_JSON_BYTES)) if file.exists() else {}


def _parse_json(file: Path, name: str, content: bytes) -> Mapping[str, object]:
    try:
        value: object = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        _refuse(file, f"not valid JSON, perhaps truncated ({error})", name)
    if not is_object(value):
        _refuse(file, "not a JSON object", name)
    return value


def _read_tokenizer(file: Path, name: str) -> bytes:
    """Bytes of tokenizer.json. Parsing it takes longer than all the rest, so that is left to who loads it."""
    content = _read_bytes(file, name, MAX_TOKENIZER_BYTES)
    stripped = content.strip()
    if not (stripped.startswith(b"{") and stripped.endswith(b"}")):
        _refuse(file, "not a JSON object, perhaps truncated", name)
    return content


def _text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The language model's part: models that also see or hear keep it nested."""
    nested = config.get("text_config")
    return {**config, **nested} if is_object(nested) else config


def _architecture(path: Path, name: str, config: Mapping[str, object]) -> str:
    architectures = config.get("architectures")
    first = architectures[0] if is_array(architectures) and architectures else None
    if not isinstance(first, str):
        _refuse(path / "config.json", '"architectures" names no model class', name)
    return first


def _positive(path: Path, name: str, config: Mapping[str, object], keys: tuple[str, ...]) -> int:
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if not is_natural(value) or value == 0:
            _refuse(path / "config.json", f'"{key}" must be a positive number, got {value!r}', name)
        return value
    _refuse(path / "config.json", f'"{keys[0]}" is missing', name)


def _token_ids(value: object, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of ids or nothing, as a tuple. An id outside the vocabulary can never be sampled: left out."""
    ids = value if is_array(value) else [value]
    return tuple(dict.fromkeys(id for id in ids if is_natural(id) and id < vocab_size))


def _eos_token_ids(*configs: Mapping[str, object], vocab_size: int) -> tuple[int, ...]:
    for config in configs:
        if ids := _token_ids(config.get("eos_token_id"), vocab_size):
            return ids
    return ()


def _chat_template(path: Path, name: str, tokenizer_config: Mapping[str, object]) -> str | None:
    """The file wins over tokenizer_config.json, where it is one template or a list of named ones."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return _read_bytes(file, name, MAX_JSON_BYTES).decode()
        except UnicodeDecodeError:
            _refuse(file, "not UTF-8 text", name)
    template = tokenizer_config.get("chat_template")
    if is_array(template):
        named = [entry for entry in template if is_object(entry) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _special_tokens(tokenizer_config: Mapping[str, object]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for key in _SPECIAL_TOKENS:
        token = tokenizer_config.get(key)
        content = token.get("content") if is_object(token) else token
        if isinstance(content, str):
            tokens[key] = content
    return tokens


def _read_weight_headers(path: Path, name: str) -> dict[str, SafetensorsHeader]:
    """File name → checked header, in order of name. One file, or the shards that the index names."""
    if (path / "model.safetensors").exists():
        return {"model.safetensors": _read_header(path / "model.safetensors", name)}
    index = path / "model.safetensors.index.json"
    if not index.exists():
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise ModelFolderError(
                f"{path}: the weights are pickles (*.bin), which may run code when they are read; only safetensors are"
                " read. Load and save the model with Transformers, or take another: pagewire pull smollm2"
            )
        _refuse(path / "model.safetensors", "the file is missing", name)
    weight_map = _parse_json(index, name, _read_bytes(index, name, MAX_JSON_BYTES)).get("weight_map")
    if not is_object(weight_map) or not weight_map:
        _refuse(index, '"weight_map" is missing', name)
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            _refuse(index, f"{shard!r} is not the name of a shard", name)
        shards.setdefault(shard, []).append(tensor)
    headers = {shard: _read_header(path / shard, name) for shard in sorted(shards)}
    for shard, tensors in shards.items():
        for tensor in tensors:
            if tensor not in headers[shard].tensors:
                _refuse(path / shard, f"tensor {tensor!r} is missing, which the index places here", name)
    return headers


def _has_head(config: Mapping[str, object], headers: Mapping[str, SafetensorsHeader]) -> bool:
    """Whether logits can be made: by a matrix of their own, or by that of the token embeddings."""
    tensors = (tensor for header in headers.values() for tensor in header.tensors)
    return config.get("tie_word_embeddings") is True or any(tensor.endswith(_HEADS) for tensor in tensors)


def _read_header(file: Path, name: str) -> SafetensorsHeader:
    if not file.is_file():
        _refuse(file, "the file is missing", name)
    try:
        return read_safetensors_header(file)
    except MalformedSafetensors as error:
        _refuse(file, str(error), name)
    except OSError as error:
        _refuse(file, f"the file cannot be read ({error.strerror})", name)


def _digest(config: bytes, tokenizer: bytes, headers: Mapping[str, SafetensorsHeader]) -> str:
    hasher = hashlib.blake2b(digest_size=32, person=b"pagewire-model")
    parts = [b"config.json", config, b"tokenizer.json", tokenizer]
    for file, header in headers.items():
        parts += [file.encode(), header.file_bytes.to_bytes(8, "little"), header.raw]
    for part in parts:  # lengths first, so that no two folders run into the same bytes
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()
