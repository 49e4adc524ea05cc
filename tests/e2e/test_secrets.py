"""What nobody is ever told: a caller's prompt, its answer and its key, whatever happens to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.failpoints import SCHEDULER
from protos import inference_pb2 as pb
from services.api_keys import line_of, new_key
from services.failpoints import VARIABLE
from tests.e2e import leaky
from tests.e2e.cluster import Cluster
from tests.e2e.programs import PAGEWIRE, run

CANARY = "Canary7Q"
FIRST_LETTER = 32  # the token of A: the fake model's answer to a prompt of so many tokens is the alphabet
PROMPT = CANARY * (FIRST_LETTER // len(CANARY))
ANSWER = "ABCDEFGHIJ"

Metadata = tuple[tuple[str, str | bytes], ...]


class Eavesdropper:
    """One caller with a key, and all that is told to it and to anybody else."""

    def __init__(self, model: Path, folder: Path, *, fmt: str = "text", **settings: Any) -> None:
        self.key = new_key()
        keys = folder / "keys"
        keys.write_text(line_of("acme", self.key) + "\n")
        flags = ["--api-keys", str(keys), "--log-level=debug", f"--log-format={fmt}"]
        self.cluster = Cluster(model, folder, flags=flags, **settings)
        self.told: list[str] = []  # statuses, with all their details
        self.codes: list[grpc.StatusCode] = []

    def call(self, method: str, data: bytes, metadata: Metadata | None = None) -> str:
        """The text of the whole answer; empty for one that is refused."""
        stream: grpc.UnaryStreamMultiCallable[bytes, bytes] = self.cluster.channel.unary_stream(
            f"/pagewire.v1.InferenceService/{method}"
        )
        text = ""
        try:
            shown = self.metadata if metadata is None else metadata
            for message in stream(data, metadata=shown, timeout=60, wait_for_ready=True):
                if method == "GenerateStream":
                    text += pb.GenerateStreamResponse.FromString(message).delta.text
        except grpc.RpcError as error:
            self.codes.append(error.code())
            self.told.append(f"{error.code()} {error.details()} {error.trailing_metadata()}")
            return ""
        return text or "ok"

    def ask(self, **fields: Any) -> str:
        """One answer to the prompt, or to another one."""
        stopping = pb.StopConditions(max_tokens=12, stop=[CANARY])
        request = pb.GenerateStreamRequest(**{"stopping": stopping, "text": PROMPT, **fields})
        return self.call("GenerateStream", request.SerializeToString())

    @property
    def metadata(self) -> Metadata:
        return (("authorization", f"Bearer {self.key}"),)

    def all_that_was_said(self) -> Mapping[str, str]:
        """Logs, statuses and counters. Stops the scheduler, if it is still there."""
        cluster = self.cluster
        if cluster.scheduler.popen.poll() is None:
            self.told.append(run(*PAGEWIRE, "status", cluster.admin).out)
            self.told.append(run(*PAGEWIRE, "explain", cluster.admin, "told").out)
            cluster.scheduler.popen.terminate()
            assert cluster.scheduler.wait() == 0
        logs = {process.log.name: process.log.read_text() for process in (cluster.scheduler, *cluster.executors)}
        assert " D " in logs["scheduler.log"] or '"level": "debug"' in logs["scheduler.log"], "it was at its loudest"
        return {**logs, **{f"status {i}": text for i, text in enumerate(self.told)}}

    def check(self) -> Mapping[str, str]:
        """Nothing of what it must keep to itself was said."""
        said = self.all_that_was_said()
        ids = list(range(FIRST_LETTER, FIRST_LETTER + 4))  # of the answer
        marks = {"prompt": CANARY, "answer": ANSWER[:6], "key": self.key[3:], "tokens": str(ids)[1:-1]}
        for place, text in said.items():
            for what, mark in marks.items():
                assert mark not in text, f"{what} in {place}"
        return said


@pytest.fixture
def eavesdropper(fake_folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Eavesdropper]:
    there = Eavesdropper(fake_folder, tmp_path, **getattr(request, "param", {}))
    try:
        yield there
    finally:
        there.cluster.close()


@pytest.mark.parametrize("eavesdropper", [{}, {"fmt": "json"}], indirect=True, ids=["text", "json"])
def test_no_request_good_or_bad_is_repeated(eavesdropper: Eavesdropper) -> None:
    e = eavesdropper
    e.cluster.start_executor("--log-level=debug")
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=CANARY)])
    assert e.ask(request_id="told")
    assert e.ask().startswith(ANSWER), "the answer is known, so that it can be looked for"
    assert e.ask(chat=chat)
    assert e.call("Tokenize", pb.TokenizeRequest(text=CANARY).SerializeToString())
    refused = [
        e.ask(sampling=pb.SamplingParams(temperature=-1)),
        e.ask(text=CANARY * 1000),
        e.ask(stopping=pb.StopConditions(max_tokens=3, stop=[CANARY * 100])),
        e.ask(stopping=pb.StopConditions(max_tokens=100_000, stop=[CANARY])),
        e.ask(chat=pb.ChatMessages(messages=[pb.ChatMessage(content=CANARY)])),
        e.ask(token_ids=pb.TokenIds(ids=[9999])),
        e.ask(request_id=f"{CANARY} with spaces"),
        e.call("GenerateStream", b"\x0a\x7f" + CANARY.encode()),
        e.call("Generate", b"\xff" * 9 + CANARY.encode()),
        e.call("Resume", pb.ResumeRequest(request=_resumable(), choices=[_point()]).SerializeToString()),
        e.call("NoSuchMethod", CANARY.encode()),
        e.call("GenerateStream", CANARY.encode() * (5 << 17)),
        e.call("Generate", b"", (("authorization", f"Bearer pw-{CANARY}{'x' * 35}"),)),
        e.call("Generate", b"", (("authorization", f"{e.key} {CANARY}"),)),
        e.call("Generate", b"", (("authorization", CANARY),)),
    ]
    assert not any(refused) and len(e.told) == len(refused)
    model = pb.GenerateRequest(model=CANARY, text=CANARY).SerializeToString()
    assert not e.call("Generate", model) and CANARY in e.told.pop(), "a caller's own model is named, to it alone"
    e.check()


def _resumable() -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(
        text=PROMPT, sampling=pb.SamplingParams(seed=1), stopping=pb.StopConditions(max_tokens=9), request_id="id"
    )


def _point() -> pb.ResumePoint:
    return pb.ResumePoint(choice=0, ticket=CANARY.encode() * 9, token_ids=range(FIRST_LETTER, FIRST_LETTER + 4))


def test_nothing_is_told_of_those_whose_executor_dies_and_who_leave(eavesdropper: Eavesdropper) -> None:
    e = eavesdropper
    dying = e.cluster.start_executor("--log-level=debug", "--fake-step-s=0.02")
    long = pb.GenerateStreamRequest(text=PROMPT, stopping=pb.StopConditions(max_tokens=200, ignore_eos=True))
    streams = [e.cluster.stub.GenerateStream(long, metadata=e.metadata, timeout=60) for _ in range(2)]
    for stream in streams:
        next(stream)
        next(stream)
    dying.popen.kill()
    e.cluster.start_executor("--log-level=debug")
    streams[0].cancel()
    assert [m for m in streams[1] if m.HasField("finish")]
    said = e.check()
    assert "joined" in said["scheduler.log"] and "is gone" in said["scheduler.log"]


PLACES = ("before_admit", "after_admit", "after_outbox_before_write", "before_end_chunk")


@pytest.mark.parametrize(
    "eavesdropper",
    [{"environment": {VARIABLE: ";".join(f"{place}=raise" for place in PLACES)}}],
    indirect=True,
    ids=["failpoints"],
)
def test_a_failpoint_that_raises_tells_nothing(eavesdropper: Eavesdropper) -> None:
    e = eavesdropper
    assert set(PLACES) <= set(SCHEDULER)
    e.cluster.start_executor("--log-level=debug")
    assert [e.ask() for _ in PLACES] == [""] * len(PLACES)
    assert e.codes == [grpc.StatusCode.INTERNAL] * len(PLACES)
    assert e.ask().startswith(ANSWER)
    said = e.check()
    assert said["scheduler.log"].count("failed with internal error") == len(PLACES)


@pytest.mark.parametrize("eavesdropper", [{"module": "tests.e2e.leaky"}], indirect=True, ids=["leaky"])
def test_exceptions_that_hold_prompts_and_answers_are_logged_without_their_words(eavesdropper: Eavesdropper) -> None:
    e = eavesdropper
    e.cluster.start_executor("--log-level=debug")
    for bug in (leaky.IN_THE_TOKENIZER, leaky.IN_THE_ENGINE, leaky.IN_THE_TEXT, leaky.IN_THE_EXECUTOR):
        assert not e.ask(stopping=pb.StopConditions(max_tokens=bug, ignore_eos=True)), bug
    assert e.codes == [grpc.StatusCode.INTERNAL] * 4
    assert e.ask().startswith(ANSWER), "all others are served as ever"
    assert not e.ask(stopping=pb.StopConditions(max_tokens=leaky.IN_THE_CORE, ignore_eos=True))
    assert e.cluster.scheduler.wait() == 70, "a core that failed cannot be trusted"
    said = e.check()
    for kind in ("ValueError", "KeyError", "UnicodeError", "OSError", "RuntimeError"):
        assert f"builtins.{kind}\n" in said["scheduler.log"]
    assert "builtins.RuntimeError\n" in said["executor-0.log"]
