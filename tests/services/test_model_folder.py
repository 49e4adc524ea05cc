"""A model folder says what it is, or what is wrong with it and what to type next."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ModelFolderError
from common.model_folder import ModelFolder, read_model_folder
from common.safetensors_header import MalformedSafetensors, read_safetensors_header

CONFIG: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def safetensors(tensors: Mapping[str, object], data: bytes) -> bytes:
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> Mapping[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SOUND = {"a": entry(0, 24, [2, 3]), "b": entry(24, 32, [2])}


def write_folder(path: Path, *, config: Mapping[str, object] | None = None, **files: Mapping[str, object]) -> Path:
    """A sound folder. `files` are JSON files beside config.json, by their stem."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(safetensors(SOUND, bytes(32)))
    for stem, content in files.items():
        (path / f"{stem}.json").write_text(json.dumps(content))
    return path


def read(path: Path, **files: Mapping[str, object]) -> ModelFolder:
    return read_model_folder(write_folder(path, **files))


def test_a_folder_says_what_the_model_is(tmp_path: Path) -> None:
    model = read(tmp_path / "tiny")

    assert (model.name, model.architecture) == ("tiny", "LlamaForCausalLM")
    assert (model.vocab_size, model.max_model_len) == (100, 64)
    assert (model.bos_token_id, model.eos_token_ids) == (1, (2,))
    assert not model.has_chat_template
    assert model.weight_files == (tmp_path / "tiny" / "model.safetensors",)


def test_a_folder_in_a_hugging_face_cache_is_called_by_its_repository(tmp_path: Path) -> None:
    model = read(tmp_path / "models--owner--the--name" / "snapshots" / "0123abcd")

    assert model.name == "owner/the--name"


def test_the_generation_config_decides_which_tokens_end_a_text(tmp_path: Path) -> None:
    assert read(tmp_path, generation_config={"eos_token_id": [5, 6, 5]}).eos_token_ids == (5, 6)
    assert read(tmp_path, generation_config={"eos_token_id": 7}).eos_token_ids == (7,)
    assert read(tmp_path, generation_config={}).eos_token_ids == (2,)


def test_an_end_token_outside_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, config={**CONFIG, "eos_token_id": -1}).eos_token_ids == ()
    assert read(tmp_path, config={**CONFIG, "eos_token_id": [100, 99]}).eos_token_ids == (99,)


def test_the_language_model_of_a_model_that_sees_is_found_inside(tmp_path: Path) -> None:
    nested = {"vocab_size": 200, "max_position_embeddings": 128, "eos_token_id": 3}
    model = read(tmp_path, config={"architectures": ["Gemma3ForConditionalGeneration"], "text_config": nested})

    assert (model.vocab_size, model.max_model_len, model.eos_token_ids) == (200, 128, (3,))


def test_older_names_of_the_context_length_are_known(tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 10, "n_positions": 32}

    assert read(tmp_path, config=config).max_model_len == 32


def test_a_chat_template_is_a_file_or_a_field_and_the_file_wins(tmp_path: Path) -> None:
    field = {"chat_template": "field", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    model = read(tmp_path, tokenizer_config=field)
    assert model.chat_template == "field"
    assert model.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert read(tmp_path, tokenizer_config={"chat_template": named}).chat_template == "plain"

    (tmp_path / "chat_template.jinja").write_text("file")
    assert read(tmp_path, tokenizer_config=field).chat_template == "file"


def write_shards(path: Path) -> Path:
    write_folder(path)
    (path / "model.safetensors").unlink()
    (path / "one.safetensors").write_bytes(safetensors({"a": entry(0, 4, [1])}, bytes(4)))
    (path / "two.safetensors").write_bytes(safetensors({"b": entry(0, 8, [2])}, bytes(8)))
    weight_map = {"b": "two.safetensors", "a": "one.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_weights_may_lie_in_shards(tmp_path: Path) -> None:
    model = read_model_folder(write_shards(tmp_path))

    assert [file.name for file in model.weight_files] == ["one.safetensors", "two.safetensors"]


def test_a_shard_that_lacks_a_tensor_of_the_index_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(safetensors({"c": entry(0, 8, [2])}, bytes(8)))

    with pytest.raises(ModelFolderError, match=r"two\.safetensors: tensor 'b' is missing"):
        read_model_folder(tmp_path)


@pytest.mark.parametrize("shard", ["../two.safetensors", "/etc/two.safetensors", "two.bin", 3])
def test_an_index_cannot_point_out_of_the_folder(tmp_path: Path, shard: object) -> None:
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))

    with pytest.raises(ModelFolderError, match="is not the name of a shard"):
        read_model_folder(tmp_path)


def test_two_copies_of_a_model_have_the_same_digest(tmp_path: Path) -> None:
    assert read(tmp_path / "one").digest == read(tmp_path / "two").digest


@pytest.mark.parametrize("changed", ["config.json", "tokenizer.json", "model.safetensors"])
def test_another_model_has_another_digest(tmp_path: Path, changed: str) -> None:
    before = read(tmp_path).digest
    other = {
        "config.json": json.dumps({**CONFIG, "rope_theta": 1}).encode(),
        "tokenizer.json": b"{ }",
        "model.safetensors": safetensors({"a": entry(0, 24, [3, 2]), "b": entry(24, 32, [2])}, bytes(32)),
    }
    (tmp_path / changed).write_bytes(other[changed])

    assert read_model_folder(tmp_path).digest != before


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.json", None, "the file is missing"),
        ("tokenizer.json", None, "the file is missing"),
        ("model.safetensors", None, "the file is missing"),
        ("config.json", b'{"vocab_size": 10', "not valid JSON"),
        ("config.json", b"\xff{}", "not valid JSON"),
        ("config.json", b"[" * 100_000, "not valid JSON"),
        ("config.json", b"[]", "not a JSON object"),
        ("config.json", b'{"vocab_size": 10, "max_position_embeddings": 8}', '"architectures" names no model class'),
        ("config.json", b'{"architectures": ["X"], "max_position_embeddings": 8}', '"vocab_size" is missing'),
        ("config.json", b'{"architectures": ["X"], "vocab_size": true}', '"vocab_size" must be a positive number'),
        ("config.json", b'{"architectures": ["X"], "vocab_size": 9}', '"max_position_embeddings" is missing'),
        ("tokenizer.json", b'{"model": {"vocab', "perhaps truncated"),
        ("generation_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"3", "not a JSON object"),
        ("chat_template.jinja", b"\xff\xfe", "not UTF-8 text"),
        ("model.safetensors", b"1234", "too few for a header length"),
    ],
)
def test_a_broken_file_is_named_with_its_problem_and_the_next_command(
    tmp_path: Path, file: str, content: bytes | None, problem: str
) -> None:
    write_folder(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_bytes(content)

    with pytest.raises(ModelFolderError) as caught:
        read_model_folder(tmp_path)

    assert str(caught.value).startswith(f"{tmp_path / file}: ")
    assert problem in str(caught.value)
    assert "pagewire pull" in str(caught.value)


def test_a_path_that_is_no_folder_is_refused_with_the_next_command(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no such folder.*pagewire pull smollm2"):
        read_model_folder(tmp_path / "nowhere")

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFolderError, match=r"must be converted first.*pagewire pull .*model\.gguf"):
        read_model_folder(tmp_path / "model.gguf")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(ModelFolderError, match="only safetensors are read"):
        read_model_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (struct.pack("<Q", 200_000_000) + b"{}", "claims 200000000 bytes; at most"),
        (struct.pack("<Q", 100) + b"{}", "claims 100 bytes, the file has 10"),
        (struct.pack("<Q", 4) + b"{{{{", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (safetensors({"a": 1}, b""), "has no dtype"),
        (safetensors({"a": entry(0, 4, [1], "F31")}, bytes(4)), "unknown dtype 'F31'"),
        (safetensors({"a": entry(0, 4, [-1])}, bytes(4)), "not a natural number"),
        (safetensors({"a": {**entry(0, 4, [1]), "shape": [1.0]}}, bytes(4)), "not a natural number"),
        (safetensors({"a": entry(0, 4, [2])}, bytes(4)), "does not fill 4 bytes"),
        (safetensors({"a": entry(4, 0, [1])}, bytes(4)), "does not fill -4 bytes"),
        (safetensors({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "'b' begins at 4"),
        (safetensors({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "'b' begins at 8"),
        (safetensors(SOUND, bytes(31)), "truncated: the tensors need 32 bytes, the file has 31"),
        (safetensors(SOUND, bytes(33)), "1 bytes at the end belong to no tensor"),
    ],
)
def test_a_weight_file_that_does_not_add_up_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(MalformedSafetensors, match=problem):
        read_safetensors_header(tmp_path / "model.safetensors")


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 4, [1]))
    header = f'{{"a": {one}, "a": {one}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))

    with pytest.raises(MalformedSafetensors, match="occurs twice"):
        read_safetensors_header(tmp_path / "model.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_a_damaged_weight_file_is_read_as_sound_or_refused_but_never_fails_otherwise(
    tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(safetensors(SOUND, bytes(32)))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content)))])

    try:
        header = read_safetensors_header(tmp_path / "model.safetensors")
    except MalformedSafetensors:
        return
    assert sum(tensor.end - tensor.begin for tensor in header.tensors.values()) == 32
