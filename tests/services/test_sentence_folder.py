"""Which folders make vectors, and what is said of those that do not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from common.model_folder import ModelFolder, read_model_folder
from common.sentence_folder import Embedding
from tests.services.test_model_folder import CONFIG, write_folder

TRANSFORMER, POOLING, NORMALIZE = (
    {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for n, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])
)
LAST_TOKEN = {
    "word_embedding_dimension": 32,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": True,
    "include_prompt": True,
}


def read(
    path: Path,
    *,
    modules: object = (TRANSFORMER, POOLING, NORMALIZE),
    pooling: object = LAST_TOKEN,
    config: Mapping[str, object] | None = None,
    **files: Mapping[str, object],
) -> ModelFolder:
    write_folder(path, config={**CONFIG, "hidden_size": 32, **(config or {})}, **files)
    (path / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return read_model_folder(path)


def test_a_folder_whose_pooling_takes_the_last_token_makes_vectors(tmp_path: Path) -> None:
    whole = read(tmp_path / "a", tokenizer_config={"add_eos_token": True})
    later = read(
        tmp_path / "b",
        modules=[
            TRANSFORMER,
            {**POOLING, "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"},
        ],
        pooling={"embedding_dimension": 32, "pooling_mode": "lasttoken"},
    )

    assert whole.embedding == Embedding(dimensions=32, normalizes=True, appends_eos=True)
    assert later.embedding == Embedding(dimensions=32, normalizes=False, appends_eos=False)


def test_its_digest_is_that_of_the_model_alone(tmp_path: Path) -> None:
    plain = read_model_folder(write_folder(tmp_path / "plain", config={**CONFIG, "hidden_size": 32}))

    assert read(tmp_path / "vectors").digest == plain.digest
    assert plain.makes_text and str(plain.embedding).startswith("modules.json is not there")


def test_one_whose_logits_could_not_be_made_makes_no_text(tmp_path: Path) -> None:
    assert not read(tmp_path / "a").makes_text
    assert read(tmp_path / "b", config={"tie_word_embeddings": True}).makes_text


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"modules": {}}, 'modules.json: "type" must be Transformer, Pooling and perhaps Normalize, got none'),
        ({"modules": [{"type": 1}]}, 'modules.json: each module must have a "type" and a "path"'),
        ({"modules": [TRANSFORMER, {**POOLING, "type": "custom_st.Pooling"}]}, "got Transformer, custom_st.Pooling"),
        (
            {"modules": [TRANSFORMER, POOLING, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]},
            "got Transformer, Pooling, Dense",
        ),
        ({"modules": [{**TRANSFORMER, "path": "0_T"}, POOLING]}, 'modules.json: "path" of the Transformer'),
        ({"modules": [TRANSFORMER, {**POOLING, "path": "../1"}]}, 'modules.json: "path" of the Pooling'),
        ({"pooling": None}, "1_Pooling/config.json is not there"),
        ({"pooling": []}, "1_Pooling/config.json is not a JSON object"),
        (
            {"pooling": {**LAST_TOKEN, "pooling_mode_mean_tokens": True}},
            '1_Pooling/config.json: "pooling_mode_mean_tokens" must be false',
        ),
        ({"pooling": {"pooling_mode_lasttoken": True}}, '"pooling_mode_mean_tokens" must be false'),
        ({"pooling": {**LAST_TOKEN, "pooling_mode_cls_token": True}}, '"pooling_mode_cls_token" must be false'),
        ({"pooling": {**LAST_TOKEN, "pooling_mode_lasttoken": False}}, '"pooling_mode_lasttoken" must be true'),
        (
            {"pooling": {"pooling_mode": "mean"}},
            "1_Pooling/config.json: \"pooling_mode\" must be lasttoken, got 'mean'",
        ),
        (
            {"pooling": {**LAST_TOKEN, "word_embedding_dimension": 16}},
            '"word_embedding_dimension" must be the model\'s hidden size, 32, got 16',
        ),
        (
            {"sentence_bert_config": {"do_lower_case": True}},
            'sentence_bert_config.json: "do_lower_case" must be false',
        ),
    ],
)
def test_what_makes_no_vectors_still_makes_text_and_says_which_field_of_which_file_it_is(
    tmp_path: Path, told: dict[str, object], problem: str
) -> None:
    model = read(tmp_path, **told)  # type: ignore[arg-type]

    assert model.makes_text
    assert isinstance(model.embedding, str) and problem in model.embedding


@pytest.mark.parametrize("content", ["[", "\udcff", "[" * 100_000], ids=["cut", "not text", "deep"])
def test_modules_that_cannot_be_read_are_named(tmp_path: Path, content: str) -> None:
    write_folder(tmp_path)
    (tmp_path / "modules.json").write_bytes(content.encode(errors="surrogateescape"))

    assert read_model_folder(tmp_path).embedding == "modules.json is not valid JSON"
