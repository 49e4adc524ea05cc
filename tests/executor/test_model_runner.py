"""The runner over a tiny model: steps, sampling, failures; and the folders it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from common.errors import ModelFolderError
from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan, StepResult
from common.types import BlockId, SlotRef, slot_ref
from executor.model_runner import ModelRunner
from executor.resident import PlanError
from executor.runner import execute
from executor.weights import max_positions
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny

A, B = slot_ref(0, 0), slot_ref(1, 0)
PROMPT = [5, 9, 13, 21, 34, 55, 8]
SAMPLED = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, min_p=0.01, seed=11)


def silent(_stage: str, _done: int, _total: int) -> None: ...


class World:
    """A loaded runner and the number of the next step."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        defaults: dict[str, Any] = {"dtype": "float32", "block_size": 4, "num_blocks": 32, "max_sequences": 8}
        self.runner = ModelRunner(name="tiny", model_folder=folder, **{**defaults, **settings})
        self.facts = self.runner.load(silent)
        self.next_step = 0

    def step(self, *rows: tuple[SlotRef, int], **columns: Any) -> StepResult:
        told = StepPlan(step=self.next_step, refs=[r for r, _ in rows], num_scheduled=[n for _, n in rows])
        self.next_step += 1
        return execute(self.runner, replace(told, **columns))

    def tokens(self, told: NewSequence, count: int) -> list[int]:
        """Run one sequence alone, in a session of its own, for `count` tokens."""
        self.runner.begin_session()
        found = [*self.step((told.ref, len(told.token_ids) - told.num_computed), new=[told]).tokens]
        while len(found) < count:
            found += self.step((told.ref, 1)).tokens
        return found


def sequence(ref: SlotRef, tokens: list[int], blocks: list[int], **changes: Any) -> NewSequence:
    told = NewSequence(
        ref=ref,
        attempt=0,
        token_ids=tokens,
        num_prompt=len(tokens),
        num_computed=0,
        block_table=[BlockId(block) for block in blocks],
        sampling=SamplingParams(temperature=0.0),
        choice=0,
        max_tokens=50,
        stop_token_ids=(),
    )
    return replace(told, **changes)


def test_the_facts_are_those_of_the_folder_and_the_settings(folder: Path) -> None:
    facts = World(folder, max_step_tokens=64).facts

    assert (facts.model, facts.vocab_size, facts.dtype, facts.device) == (folder.name, VOCAB_SIZE, "float32", "cpu")
    assert (facts.num_blocks, facts.block_size, facts.max_sequences, facts.max_step_tokens) == (32, 4, 8, 64)
    assert facts.max_model_len == 128


def test_the_slab_is_sized_from_free_memory_when_nothing_is_given(folder: Path) -> None:
    facts = World(folder, num_blocks=None).facts

    assert facts.num_blocks == 8 * 32  # eight sequences of full length fit easily, and no more is taken


def test_a_resumed_sequence_goes_on_as_if_it_had_never_moved(folder: Path) -> None:
    world = World(folder)
    for sampling in (SamplingParams(temperature=0.0), SAMPLED):
        whole = world.tokens(sequence(A, PROMPT, [3, 9, 4, 1], sampling=sampling), 9)

        moved = sequence(B, PROMPT + whole[:4], [7, 2, 8, 5], num_prompt=len(PROMPT), sampling=sampling)

        assert world.tokens(moved, 5) == whole[4:]


def test_seeded_tokens_do_not_depend_on_company_or_chunks(folder: Path) -> None:
    world = World(folder)
    alone = world.tokens(sequence(A, PROMPT, [3, 9, 4], sampling=SAMPLED), 4)
    world.runner.begin_session()

    others = [
        sequence(slot_ref(slot, 0), PROMPT[slot:], [slot * 3 + 8, slot * 3 + 9, slot * 3 + 10]) for slot in range(1, 5)
    ]
    world.step(*((other.ref, len(other.token_ids)) for other in others), new=others)
    world.step((A, 3), (others[0].ref, 1), new=[sequence(A, PROMPT, [3, 9, 4], sampling=SAMPLED)])
    crowded = []
    for count in (4, 1, 1, 1):
        result = world.step(*((other.ref, 1) for other in others), (A, count))
        crowded.append(result.tokens[result.refs.index(A)])

    assert crowded == alone


def test_choices_and_seeds_tell_the_streams_apart(folder: Path) -> None:
    world = World(folder)
    streams = [
        world.tokens(sequence(A, PROMPT, [3, 9, 4, 1], sampling=replace(SAMPLED, seed=seed), choice=choice), 8)
        for seed, choice in [(11, 0), (11, 1), (12, 0), (11, 0)]
    ]

    assert streams[0] == streams[3]
    assert len({tuple(stream) for stream in streams}) == 3


def test_a_fork_writes_to_its_own_copy_of_the_last_block(folder: Path) -> None:
    world = World(folder)
    plain = world.tokens(sequence(A, PROMPT, [3, 9, 4, 1]), 6)
    world.runner.begin_session()
    world.step((A, 7), new=[sequence(A, PROMPT, [3, 9, 4, 1])])

    fork = sequence(B, [*PROMPT, 60], [3, 20, 21], num_prompt=7, num_computed=7)
    first = world.step((B, 1), (A, 1), new=[fork], copies=[(9, 20)])
    forked = [first.tokens[0], *world.step((B, 1)).tokens, *world.step((B, 1)).tokens]
    went_on = [plain[0], first.tokens[1], *(world.step((A, 1)).tokens[0] for _ in range(4))]

    assert went_on == plain
    assert forked == world.tokens(sequence(A, [*PROMPT, 60], [1, 2, 3]), 3)


def test_a_stop_token_ends_the_sequence_here(folder: Path) -> None:
    world = World(folder)
    plain = world.tokens(sequence(A, PROMPT, [3, 9, 4, 1]), 4)
    world.runner.begin_session()
    world.step((A, 7), new=[sequence(A, PROMPT, [3, 9, 4, 1], stop_token_ids=(plain[1],))])
    assert world.step((A, 1)).tokens == [plain[1]]

    late = world.step((A, 1))

    assert (late.step, late.refs, late.tokens, late.failed) == (world.next_step - 1, [], [], [])


def test_a_step_without_sampled_rows_has_a_result_too(folder: Path) -> None:
    world = World(folder)

    result = world.step((A, 4), new=[sequence(A, PROMPT, [3, 9])])

    assert (result.refs, result.tokens, result.failed) == ([], [], [])
    assert result.compute_ns > 0


def test_a_row_with_logits_that_are_not_finite_fails_alone_and_poisons_no_block(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][60] = torch.nan  # a token that breaks whoever reads it
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].nan_to_num().clone())
    broken = copy_folder(folder, tmp_path, weights)
    world = World(broken)
    healthy = world.tokens(sequence(A, PROMPT, [3, 9, 4]), 3)
    world.runner.begin_session()

    new = [sequence(A, PROMPT, [3, 9, 4]), sequence(B, [60, 4, 5], [11])]
    first = world.step((A, 7), (B, 3), new=new)
    assert list(first.failed) == [B]
    second = world.step((A, 1), (B, 1))  # the failed row was in flight: it is skipped
    assert list(second.failed) == []
    assert [*first.tokens, *second.tokens, *world.step((A, 1)).tokens] == healthy

    world.step(released=[A, B])
    again = sequence(slot_ref(2, 0), PROMPT, [11, 3, 4])  # a block that still holds the NaN behind its own tokens
    assert world.step((again.ref, 7), new=[again]).tokens == healthy[:1]


def test_a_plan_that_does_not_fit_is_refused_and_a_new_session_starts_from_nothing(folder: Path) -> None:
    world = World(folder)
    world.step((A, 7), new=[sequence(A, PROMPT, [3, 9])])
    with pytest.raises(PlanError):
        world.step((B, 1))

    world.runner.begin_session()

    with pytest.raises(PlanError):
        world.step((A, 1))
    assert len(world.step((A, 7), new=[sequence(A, PROMPT, [3, 9])]).tokens) == 1


def copy_folder(folder: Path, to: Path, weights: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    told = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**told, **config}))
    (to / "tokenizer.json").write_text("{}")
    save_file(weights or load_file(folder / "model.safetensors"), to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_a_folder_without_some_weights_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]

    with pytest.raises(ModelFolderError, match=r"missing_keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        World(copy_folder(folder, tmp_path, weights))


def test_weights_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="mismatch"):
        World(copy_folder(folder, tmp_path, intermediate_size=32))


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("mamba", {"state_size": 8}, "Mamba"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM has layers that are not served: conv"),
        ("falcon", {}, "FalconForCausalLM"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "BloomForCausalLM"),
    ],
)
def test_an_architecture_that_paged_attention_cannot_serve_is_refused_by_name(
    kind: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelFolderError, match=says):
        World(save_tiny(kind, tmp_path, **changes))


def test_fewer_bits_are_had_in_any_architecture_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    World(save_tiny("gpt2", tmp_path / "even"), weights="int8")
    assert "9 linear layers, 9 of them int8" in caplog.text

    with pytest.raises(ModelFolderError, match="GPT2LMHeadModel cannot have int8 weights: no layer of it can"):
        World(save_tiny("gpt2", tmp_path / "odd", hidden_size=48, n_embd=48, n_inner=80), weights="int8")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "int3"}, "dtype must be one of auto, float32"),
        ({"max_model_len": 129}, r"max_model_len must be in \[2, 128\]"),
        ({"num_blocks": None, "kv_cache_bytes": 1}, "hold 0 tokens"),
        ({"device": "abacus"}, "there is no device 'abacus'"),
        ({"attention_backend": "fast"}, "there are: auto, triton, native, torch, reference"),
        ({"kv_cache_dtype": "fp8"}, "an fp8 KV cache is for a GPU"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelFolderError, match=says):
        World(folder, **settings)


def test_rotary_frequencies_that_depend_on_the_longest_row_limit_the_length() -> None:
    def limit(**rope: Any) -> int | None:
        return max_positions(AutoConfig.for_model("llama", max_position_embeddings=4096, rope_parameters=rope))

    assert limit(rope_type="default", rope_theta=1e4) is None
    assert limit(rope_type="dynamic", rope_theta=1e4, factor=2.0, original_max_position_embeddings=1024) == 1024
