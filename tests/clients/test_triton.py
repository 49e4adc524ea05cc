"""Triton's own client against a scheduler that speaks KServe's Open Inference Protocol."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from protos import inference_pb2 as pb
from tests.e2e.cluster import ROOT, Cluster
from tests.e2e.programs import run

PROGRAM = str(ROOT / "tests" / "clients" / "triton_program.py")
# Its protobuf is older: make clients has it in an environment of its own.
PYTHON = os.environ.get("PAGEWIRE_TRITON_PYTHON", str(ROOT / ".venv-triton" / "bin" / "python"))

pytestmark = pytest.mark.skipif(not Path(PYTHON).exists(), reason="tritonclient is not in .venv-triton: make clients")


@pytest.fixture
def served(fake_folder: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler of its own: it is asked at the end what became of its requests."""
    running = Cluster(fake_folder, tmp_path, flags=["--open-inference", "--log-format=json"])
    try:
        running.start_executor("--fake-step-s=0.04")  # what is cancelled would take sixteen seconds
        yield running
    finally:
        running.close()


def test_tritonclient_infers_streams_cancels_and_is_refused(served: Cluster) -> None:
    ended = run(PYTHON, PROGRAM, served.address, "fake", "hello")
    assert ended.code == 0, ended.err
    told = {what: value for line in ended.out.splitlines() for what, value in json.loads(line).items()}

    answer = "&'()*+,-"  # of the fake model
    assert told.pop("inputs")[:2] == ["text_input", "stream"]
    assert told == {
        "ready": [True, True, True],
        "decoupled": True,
        "server": "pagewire",
        "whole": answer,
        "tensors": [answer, "length"],
        "counted": 8,
        "seeded": True,
        "refused": ["StatusCode.INVALID_ARGUMENT", "parameters.temperature: must be in [0, 100], got -1.0"],
        "stream": answer,
        "many": True,
        "refused in the stream": "parameters.top_p: must be in (0, 1], got 7.0",
        "after it": answer,
        "cancelled": True,
    }
    finished = served.counters()["finished"]
    assert finished == {str(pb.FINISH_REASON_LENGTH): 6, str(pb.FINISH_REASON_ABORTED): 1}


def test_a_real_model_says_the_same_to_tritonclient_as_to_our_own(default_model: Path, tmp_path: Path) -> None:
    running = Cluster(default_model, tmp_path, flags=["--open-inference"])
    try:
        running.start_executor("--dtype=float32", fake=False)
        own = running.stub.Generate(
            pb.GenerateRequest(
                text="The sea is",
                sampling=pb.SamplingParams(temperature=0.0),
                stopping=pb.StopConditions(max_tokens=8),
            )
        )
        ended = run(PYTHON, PROGRAM, running.address, own.prompt.model, "The sea is")
        assert ended.code == 0, ended.err
        told = {what: value for line in ended.out.splitlines() for what, value in json.loads(line).items()}
        assert told["whole"] == told["stream"] == told["tensors"][0] == told["after it"] == own.choices[0].text
        assert told["seeded"] and told["many"]
    finally:
        running.close()
