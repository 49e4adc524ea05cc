"""The program that checks a GPU, on its fake device: it runs, tells what fails, and leaves a report in any case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.check import parts, program, render, stages, worker
from tests.gpu.check.checkpoint import tokenizer, write_checkpoint
from tests.gpu.check.floors import step_floor
from tests.gpu.check.journal import FAILED, OK, SKIPPED, Journal
from tests.gpu.check.offline import alone, offline
from tests.gpu.check.parts import Aim, Check, Found, Part, Skipped
from tests.gpu.check.shapes import LLAMA_3_8B, QWEN3_0_6B, TINY_LLAMA, TINY_QWEN3
from tests.gpu.check.stages import Stage

ROOT = Path(__file__).resolve().parents[2]


def check(*arguments: str, out: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The whole program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.check", "--out", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=550,  # it may run beside all other tests, and on two slow cores
        check=False,
    )
    return done, json.loads((out / "results.json").read_text())


def test_without_a_gpu_it_says_so_and_is_content(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done, report = check("--stages", "0", out=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "No GPU to check" in done.stdout
    assert report["about"]["no_device"]
    assert report["stages"]["0"]["status"] == SKIPPED


def test_every_stage_runs_on_the_fake_device(tmp_path: Path) -> None:
    done, report = check("--device", "fake", "--peers", "--budget", "2000", out=tmp_path)

    problems = {
        f"{stage['name']}/{name}": (part["problems"], part.get("traceback"))
        for stage in report["stages"].values()
        for name, part in stage["parts"].items()
        if part["status"] != OK
    }
    assert problems == {}
    assert done.returncode == 0, done.stdout + done.stderr
    assert [stage["name"] for stage in report["stages"].values()] == [stage.name for stage in stages.STAGES]
    assert all(stage["parts"] for stage in report["stages"].values())
    assert "aims" in done.stdout
    assert "these numbers mean nothing" in render.markdown(report)


# ---- what happens when something fails


def failing(_: Check) -> Found:
    raise ZeroDivisionError("as planned")


def skipping(_: Check) -> Found:
    raise Skipped("no such thing here")


def working(check: Check) -> Found:
    return Found(values={"seen": sorted(check.earlier)}, lines=["well"], aims=[Aim(what="a", measured=2, bound=1)])


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A stage of which some parts fail, in this module's place."""
    stage = Stage(number=0, name="planted", module="tests.gpu.check.environment", share_s=1)
    every = [
        Part(name="fails", work=failing, takes_s=0),
        Part(name="cannot run", work=skipping, takes_s=0),
        Part(name="takes too long", work=working, takes_s=1e9),
        Part(name="works", work=working, takes_s=0),
    ]
    monkeypatch.setattr("tests.gpu.check.environment.parts", lambda _: every)
    monkeypatch.setattr(program, "STAGES", (stage,))
    return stage


def run(stage: Stage, folder: Path) -> Journal:
    journal = Journal(folder / "journal.jsonl")
    until_s = time.monotonic() + 1e7
    worker.run([stage], journal, fake=True, until_s=until_s, folder=folder, out=folder)
    return journal


def test_a_part_that_fails_is_told_with_its_trace_and_the_rest_goes_on(planted: Stage, tmp_path: Path) -> None:
    told = run(planted, tmp_path).read().stages[0]

    assert {name: end["status"] for name, end in told.ended.items()} == {
        "fails": FAILED,
        "cannot run": SKIPPED,
        "takes too long": SKIPPED,
        "works": OK,
    }
    assert "as planned" in told.ended["fails"]["traceback"]
    assert told.ended["cannot run"]["problems"] == ["no such thing here"]
    assert (told.status, told.is_over) == (FAILED, True)


def test_what_was_done_is_not_done_again_by_the_next_process(planted: Stage, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("stage", stage=0, parts=["fails"])
    journal.write("end", stage=0, part="fails", status=FAILED, values={}, problems=["its process died"])

    run(planted, tmp_path)

    assert journal.read().stages[0].ended["fails"]["problems"] == ["its process died"]


def test_a_process_that_dies_fails_its_part_and_another_goes_on(
    planted: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = program.Settings(stages=[planted], fake=True, budget_s=1e7, out=tmp_path, command="check")
    journal = Journal(tmp_path / "journal.jsonl")
    lives = iter([True, False])

    def one_worker(_self: object, group: list[Stage], until_s: float) -> str:
        if next(lives):
            journal.write("stage", stage=0, parts=["fails", "cannot run", "takes too long", "works"])
            journal.write("begin", stage=0, part="fails", limit_s=1)
            return "died of SIGSEGV"
        run(planted, tmp_path)
        return "ended with exit code 0"

    monkeypatch.setattr(program.Program, "_worker", one_worker)
    report = program.Program(settings).run()

    parts = report["stages"]["0"]["parts"]
    assert parts["fails"]["problems"] == ["died of SIGSEGV"]
    assert parts["works"]["status"] == OK
    table = render.table(report)
    assert "died of SIGSEGV" in table
    assert "missed a: 2 (at most 1)" in table
    assert "**missed**" in render.markdown(report)
    assert json.loads((tmp_path / "results.json").read_text()) == report


def test_a_process_that_does_nothing_is_not_started_for_ever(
    planted: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = program.Settings(stages=[planted], fake=True, budget_s=1e7, out=tmp_path, command="check")
    monkeypatch.setattr(program.Program, "_worker", lambda *_: "ended with exit code 1")

    report = program.Program(settings).run()

    assert report["stages"]["0"]["status"] == FAILED
    assert "exit code 1" in report["stages"]["0"]["problem"]


def test_a_stage_that_cannot_begin_does_not_keep_the_next_from_it(tmp_path: Path) -> None:
    missing = Stage(number=1, name="missing", module="tests.gpu.check.no_such_module", share_s=1)

    told = run(missing, tmp_path).read().stages[1]

    assert told.status == FAILED and told.problem is not None
    assert "no_such_module" in told.problem["traceback"]


def test_a_part_that_hangs_is_ended_and_so_is_a_check_whose_time_is_over(tmp_path: Path) -> None:
    settings = program.Settings(stages=[], fake=True, budget_s=100, out=tmp_path, command="check")
    check, journal, now_s = program.Program(settings), Journal(tmp_path / "journal.jsonl"), time.monotonic()

    assert check._should_end(now_s + 1000) is None
    journal.write("begin", stage=0, part="patient", limit_s=1000)
    assert check._should_end(now_s + 1000) is None
    assert check._should_end(now_s - 1000) == "was ended: the budget is used up"
    journal.write("end", stage=0, part="patient", status=OK)
    journal.write("begin", stage=0, part="endless", limit_s=-1)
    assert check._should_end(now_s + 1000) == "was ended after -1 s: it hangs"


def test_stages_that_start_processes_get_one_of_their_own_and_their_share_of_the_time() -> None:
    groups = [([s.number for s in group], reserved) for group, reserved in program._groups(stages.STAGES, 900)]

    assert [numbers for numbers, _ in groups] == [[0, 1, 2, 3, 4, 5], [6], [7]]
    assert [reserved for _, reserved in groups] == [350, 240, 0]
    assert [reserved for _, reserved in program._groups(stages.STAGES, 335)] == [175, 120, 0]  # all have half
    assert [stage.number for stage in stages.selected("", peers=False)] == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="no stage 9"):
        stages.selected("1,9", peers=False)


# ---- what it measures with


def test_the_floors_are_those_of_the_design() -> None:
    rates = {"bytes_per_s": 4.3e12, "flop_per_s": 790e12}

    assert step_floor(QWEN3_0_6B, [(511, 1)], **rates).ms == pytest.approx(0.29, rel=0.02)
    assert step_floor(QWEN3_0_6B, [(511, 1)] * 256, **rates).ms == pytest.approx(3.95, rel=0.02)
    assert step_floor(LLAMA_3_8B, [(511, 1)] * 64, **rates).ms == pytest.approx(4.5, rel=0.02)
    assert step_floor(LLAMA_3_8B, [(0, 2048)], **rates).ms == pytest.approx(37.6, rel=0.06)


def test_the_workload_is_that_of_nano_vllm() -> None:
    first, second = offline(), offline(1)

    assert len(first.requests) == 256
    assert sum(request.max_tokens for request in first.requests) == 133_966  # as its README says
    lengths = [(len(r.prompt), r.max_tokens) for r in first.requests]
    assert lengths == [(len(r.prompt), r.max_tokens) for r in second.requests]
    assert first.requests[0].prompt != second.requests[0].prompt
    assert alone().one_at_a_time


@pytest.mark.parametrize("shape", [TINY_QWEN3, TINY_LLAMA], ids=lambda shape: shape.kind)
def test_the_folder_is_one_that_transformers_and_we_read(shape: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    from common.model_folder import read_model_folder  # noqa: PLC0415

    folder = write_checkpoint(shape, tmp_path / "model")
    auto: Any = AutoModelForCausalLM
    model, loading = auto.from_pretrained(folder, output_loading_info=True)
    words: Any = AutoTokenizer.from_pretrained(folder)

    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.dtype is torch.bfloat16
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert words.decode(words.encode("a few words", add_special_tokens=False)) == "a few words"
    assert words.decode([300]) == " " + words.decode([300]).strip() != " "
    assert read_model_folder(folder).vocab_size == shape.size.vocabulary == len(tokenizer(384)["model"]["vocab"])


def test_every_id_of_a_large_vocabulary_is_another_text() -> None:
    vocab = tokenizer(151_936)["model"]["vocab"]

    assert len(vocab) == 151_936
    assert sorted(vocab.values()) == list(range(151_936))


def test_an_aim_knows_whether_it_was_reached() -> None:
    assert Aim(what="", measured=1.0, bound=1.0).met
    assert not Aim(what="", measured=1.1, bound=1.0).met
    assert Aim(what="", measured=1.1, bound=1.0, at_most=False).met


def test_ceilings_that_were_not_measured_are_those_of_the_design(tmp_path: Path) -> None:
    measured = {"environment/memory": {"ceiling_gb_s": 3000.0}}

    def told(earlier: dict[str, dict[str, Any]]) -> parts.Check:
        return Check(fake=True, folder=tmp_path, out=tmp_path, earlier=earlier, until_s=0)

    assert told({}).bytes_per_s == 4.3e12
    assert told(measured).bytes_per_s == 3e12
