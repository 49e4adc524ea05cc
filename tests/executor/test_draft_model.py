"""A smaller model that guesses: its K and V are those of the sequence, whatever became of the sequence's blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import ModelFolderError
from common.sampling import SamplingParams
from common.step import ExecutorFacts
from executor import model_runner
from executor.model_runner import ModelRunner
from executor.proposers.draft_model import DraftModel
from executor.runner import Report
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny
from tests.scheduler.world import GREEDY, World

PROMPT = [5, 9, 13, 21, 34, 55, 8, 44, 3, 17, 80, 12, 60, 7, 31, 92, 15, 4, 70, 22]


class Checked(DraftModel):
    """What it guesses is what it would if it computed everything anew."""

    num_checked = 0

    def propose(self, slots: NDArray[np.int64], most: NDArray[np.int64]) -> list[list[int]]:
        found = super().propose(slots, most)
        kept, self._is_fresh[:] = self._is_fresh.copy(), False
        anew = super().propose(slots, most)
        self._is_fresh[:] = kept
        for one, other in zip(found, anew, strict=True):
            if one and other:  # else there was too much to catch up with
                assert one == other
                Checked.num_checked += 1
        return found


class Eager(ModelRunner):
    """It says that its guesses cost nothing, although its models are as large as each other."""

    def load(self, report: Report) -> ExecutorFacts:
        return replace(super().load(report), draft_cost=1.0)


class ModelWorld(World):
    """A scheduler and executors that compute."""

    target: Path
    draft: Path | None
    runner_of: type[ModelRunner] = Eager

    def __init__(self, target: Path, draft: Path | None, **shape: Any) -> None:
        self.target, self.draft = target, draft
        super().__init__(vocab_size=VOCAB_SIZE, max_model_len=64, credit=2, block_size=16, **shape)

    def runner_class(self, *, name: str, vocab_size: int, next_token: Any, **shape: Any) -> Any:  # type: ignore[override]
        return self.runner_of(
            name=name,
            model_folder=self.target,
            dtype="float32",
            speculate="draft" if self.draft is not None else "none",
            draft_model=self.draft,
            max_drafts=3,
            step_overhead_tokens=64,
            max_step_tokens=64,
            **shape,
        )


class HonestWorld(ModelWorld):
    """The same, told what guesses cost."""

    runner_of = ModelRunner


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def smaller(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It agrees with the target now and then: half of the target's layers."""
    import json  # noqa: PLC0415

    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("draft")
    config = json.loads((target / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    (folder / "tokenizer.json").write_text("{}")
    weights = load_file(target / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def crowd(world: World) -> dict[str, list[int]]:
    """Shared prefixes, forks, and more than there is room for."""
    world.add("a", PROMPT, max_tokens=20)
    world.add("b", [*PROMPT, 1, 2], max_tokens=16, n=3, sampling=SamplingParams(temperature=0.7, seed=3))
    world.run()
    world.add("c", PROMPT[:17], max_tokens=24, sampling=SamplingParams(temperature=1.0, seed=4))
    world.add("d", [*PROMPT, *world.tokens["a"][:8]], max_tokens=20)
    world.add("e", [*PROMPT, 1, 2], max_tokens=18, sampling=SamplingParams(seed=5), max_drafts=1)
    world.run()
    return world.tokens


@pytest.mark.parametrize("num_blocks", [32, 6])
def test_its_guesses_are_right_about_the_past_whatever_happened_to_the_blocks(
    target: Path, smaller: Path, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "DraftModel", Checked)
    monkeypatch.setattr(Checked, "num_checked", 0)
    plain = crowd(ModelWorld(target, None, num_blocks=num_blocks))
    world = ModelWorld(target, smaller, num_blocks=num_blocks)

    assert crowd(world) == plain
    assert Checked.num_checked > 20
    assert 0 < world.scheduler.counters.accepted_tokens < world.scheduler.counters.drafted_tokens
    assert bool(world.scheduler.counters.preemptions) == (num_blocks == 6)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, seed=8)])
def test_a_model_that_agrees_is_always_right_also_at_a_temperature(target: Path, sampling: SamplingParams) -> None:
    world = ModelWorld(target, target)
    for name in "abc":
        world.add(name, PROMPT, max_tokens=25, sampling=sampling)
    world.run()

    counters = world.scheduler.counters
    assert counters.accepted_tokens == counters.drafted_tokens > 40


def test_both_slabs_are_counted(target: Path) -> None:
    def blocks(draft: Path | None) -> int:
        runner = ModelRunner(
            name="tiny",
            model_folder=target,
            dtype="float32",
            kv_cache_bytes=1 << 18,
            speculate="draft" if draft is not None else "none",
            draft_model=draft,
        )
        return runner.load(lambda *_: None).num_blocks

    assert blocks(target) == blocks(None) // 2


def test_a_model_of_another_vocabulary_is_refused(target: Path, tmp_path: Path) -> None:
    def load(draft: Path | None) -> None:
        ModelRunner(name="tiny", model_folder=target, speculate="draft", draft_model=draft).load(lambda *_: None)

    other = save_tiny("llama", tmp_path / "more", vocab_size=VOCAB_SIZE + 3)
    with pytest.raises(ModelFolderError, match=rf"has {VOCAB_SIZE + 3} tokens and .* {VOCAB_SIZE}: a draft model must"):
        load(other)

    renamed = save_tiny("llama", tmp_path / "renamed")
    (renamed / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(ModelFolderError, match=r"has as many tokens as .*, but other ones"):
        load(renamed)

    with pytest.raises(ModelFolderError, match="Type: --draft-model PATH"):
        load(None)


def test_a_guess_costs_what_the_models_weights_say(target: Path, smaller: Path) -> None:
    def cost(draft: Path) -> float:
        return HonestWorld(target, draft, num_blocks=8).scheduler.sessions[0].facts.draft_cost

    assert cost(target) == 1 + 65  # a step's overhead is 64 tokens there
    assert 1 < cost(smaller) < 1 + 65
