"""Streams over HTTP outlive schedulers, connections and gateways; who leaves for good is not answered to the end."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from protos import monitoring_pb2, monitoring_pb2_grpc
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import ASK, Event, Gateway
from tests.e2e.sockets import port_that_stays

HASH = "--fake-tokens=hash"
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 60,
    "ignore_eos": True,
    "seed": 7,
    "stream": True,
    "return_token_ids": True,
}
COMPLETION: dict[str, Any] = {
    "prompt": [[1, 2, 3], [4, 5, 6, 7]],
    "n": 2,
    "max_tokens": 40,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}
PATHS = {"chat": ("/v1/chat/completions", CHAT), "completion": ("/v1/completions", COMPLETION)}


@pytest.fixture(scope="module")
def running(fake_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = ["--listen", f"127.0.0.1:{port_that_stays()}"]
    cluster = Cluster(fake_folder, tmp_path_factory.mktemp("cluster"), flags=flags)
    try:
        cluster.start_executor(HASH, "--fake-step-s=0.005")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def slow(running: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Another one, with the same keys for tickets, whose answers do not end before a test has done what it does."""
    keys = f"--ticket-keys={running.folder / 'ticket-keys'}"
    cluster = Cluster(running.model, tmp_path_factory.mktemp("slow"), flags=[keys])
    try:
        cluster.start_executor(HASH, "--fake-step-s=0.1")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def start(running: Cluster, tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Starts gateways."""
    started: list[Gateway] = []

    def starter(*flags: str, cluster: Cluster = running) -> Gateway:
        started.append(Gateway(cluster.address, tmp_path / f"log-{len(started)}", *flags))
        return started[-1]

    yield starter
    for gateway in started:
        gateway.close()


@pytest.fixture(scope="module")
def gateway(running: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(running.address, tmp_path_factory.mktemp("gateway") / "log") as made:
        yield made


def told(events: list[Event]) -> dict[int, tuple[str, list[int], list[str]]]:
    """Text, token ids and ends of each choice."""
    found: dict[int, tuple[str, list[int], list[str]]] = {}
    for event in events:
        for choice in event.data["choices"] if event.data != "[DONE]" else ():
            text, ids, ends = found.get(choice["index"], ("", [], []))
            text += choice.get("text", "") or choice.get("delta", {}).get("content") or ""
            ids = ids + choice.get("token_ids", [])
            ends = ends + ([choice["finish_reason"]] if choice["finish_reason"] else [])
            found[choice["index"]] = (text, ids, ends)
    return found


def status(running: Cluster) -> monitoring_pb2.SchedulerStatus:
    """What the scheduler did."""
    with grpc.insecure_channel(running.admin) as channel:
        stub = monitoring_pb2_grpc.MonitoringServiceStub(channel)
        return stub.GetStatus(monitoring_pb2.GetStatusRequest()).scheduler


def until(running: Cluster, so: Callable[[monitoring_pb2.SchedulerStatus], object]) -> monitoring_pb2.SchedulerStatus:
    """What the scheduler says of itself once it is so."""
    until_s = time.monotonic() + 120
    while not so(found := status(running)):
        assert time.monotonic() < until_s, found
        time.sleep(0.01)
    return found


def test_a_scheduler_is_killed_and_comes_back_and_its_stream_goes_on(
    fake_folder: Path, running: Cluster, gateway: Gateway, tmp_path: Path
) -> None:
    asked = {**CHAT, "max_tokens": 200}
    whole = list(gateway.post("/v1/chat/completions", asked).events())

    reply = gateway.post("/v1/chat/completions", asked)
    events = reply.events()
    heard = list(islice(events, 10))
    running.scheduler.signal(signal.SIGKILL)
    running.scheduler.wait()
    again = Cluster(running.model, running.folder, flags=["--listen", running.address])
    running.scheduler, running.admin = again.scheduler, again.admin  # the module's from now on
    again.channel.close()
    heard += events

    assert told(heard) == told(whole)
    assert heard[-1].data == "[DONE]"


@pytest.mark.parametrize("kind", list(PATHS))
@pytest.mark.parametrize("more", [{}, {"resumable": True}], ids=["left", "waited for"])
@pytest.mark.parametrize("count", [17])
def test_who_comes_back_with_the_last_id_hears_the_rest(
    gateway: Gateway, start: Callable[..., Gateway], kind: str, more: dict[str, Any], count: int
) -> None:
    path, asked = PATHS[kind]
    reply = gateway.post(path, {**asked, **more, "seed": 5})
    heard = list(islice(reply.events(), count))
    reply.close()

    again = gateway.post(path, {**asked, **more, "seed": 5}, {"last-event-id": heard[-1].id})
    heard += again.events()

    whole = list(gateway.post(path, {**asked, "seed": 5}).events())
    assert told(heard) == told(whole)
    assert len({event.data["id"] for event in heard if event.data != "[DONE]"}) == 1
    roles = [c["delta"].get("role") for e in heard if e.data != "[DONE]" for c in e.data["choices"] if "delta" in c]
    assert roles.count("assistant") == (1 if kind == "chat" else 0), "it is told who speaks, once"
    assert [e.data["usage"] for e in heard[-2:-1] if e.data.get("usage")] == [
        e.data["usage"] for e in whole[-2:-1] if e.data.get("usage")
    ]


def test_the_dice_of_a_stream_that_goes_on_are_those_it_began_with(gateway: Gateway) -> None:
    asked = {**CHAT, "seed": None}
    reply = gateway.post("/v1/chat/completions", asked)
    heard = list(islice(reply.events(), 12))
    reply.close()
    heard += gateway.post("/v1/chat/completions", asked, {"last-event-id": heard[-1].id}).events()
    again = list(gateway.post("/v1/chat/completions", asked, {"last-event-id": heard[0].id}).events())

    text, ids, ends = told(heard)[0]
    assert len(ids) == 60 and ends == ["length"]
    assert text.endswith(told(again)[0][0]) and ids[-len(told(again)[0][1]) :] == told(again)[0][1]


def test_a_gateway_is_killed_and_another_one_goes_on_with_the_tokens_that_were_kept(
    start: Callable[..., Gateway], gateway: Gateway, running: Cluster
) -> None:
    asked = {**CHAT, "n": 2}
    whole = told(list(gateway.post("/v1/chat/completions", asked).events()))
    first = start()
    reply = first.post("/v1/chat/completions", asked)
    heard = list(islice(reply.events(), 21))
    first.process.signal(signal.SIGKILL)
    first.process.wait()
    reply.close()

    tokens = [told(heard)[n][1] if n in told(heard) else [] for n in (0, 1)]
    before = until(running, lambda told: not told.num_running)  # nobody reads what was asked by the one that is gone
    rest = gateway.post("/v1/chat/completions", {**asked, "resume_token_ids": tokens}, {"last-event-id": heard[-1].id})
    heard += rest.events()

    assert told(heard) == whole
    made = status(running).output_tokens - before.output_tokens
    assert made <= 120 - sum(map(len, tokens)) + 4, "what was told was not made again"


def test_a_response_goes_on_with_its_numbers(gateway: Gateway) -> None:
    asked = {"input": "hi", "max_output_tokens": 30, "ignore_eos": True, "seed": 3, "stream": True}
    whole = list(gateway.post("/v1/responses", asked).events())
    reply = gateway.post("/v1/responses", asked)
    heard = list(islice(reply.events(), 9))
    reply.close()
    heard += gateway.post("/v1/responses", asked, {"last-event-id": heard[-1].id}).events()

    assert [event.data["sequence_number"] for event in heard] == list(range(len(heard)))

    def deltas(events: list[Event]) -> str:
        return "".join(e.data["delta"] for e in events if e.name == "response.output_text.delta")

    assert deltas(heard) == deltas(whole)
    assert heard[-1].data["response"]["output"][0]["content"] == whole[-1].data["response"]["output"][0]["content"]


def test_a_stream_that_was_told_to_its_end_has_no_rest(gateway: Gateway) -> None:
    asked = {**CHAT, "stream_options": {"include_usage": True}, "max_tokens": 3}
    whole = list(gateway.post("/v1/chat/completions", asked).events())

    rest = list(gateway.post("/v1/chat/completions", asked, {"last-event-id": whole[-2].id}).events())

    assert [event.data for event in rest] == ["[DONE]"]


@pytest.mark.parametrize(
    ("changes", "id"),
    [
        ({}, "nonsense"),
        ({}, "AAAA"),
        ({"seed": 8}, None),
        ({"n": 2}, None),
        ({"request_id": "mine"}, None),
        ({"messages": [{"role": "user", "content": "ho"}]}, None),
        ({"resume_token_ids": [[1]]}, None),
    ],
    ids=["nonsense", "empty", "seed", "choices", "name", "prompt", "tokens"],
)
def test_an_id_of_another_stream_is_refused(gateway: Gateway, changes: dict[str, Any], id: str | None) -> None:
    heard = list(gateway.post("/v1/chat/completions", {**CHAT, "max_tokens": 9}).events())

    reply = gateway.post(
        "/v1/chat/completions", {**CHAT, "max_tokens": 9, **changes}, {"last-event-id": id or heard[4].id}
    )

    assert reply.status == 400
    assert reply.error()["param"] in ("Last-Event-ID", "resume_token_ids[0]")


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_leaves_is_not_answered_to_the_end(
    start: Callable[..., Gateway], slow: Cluster, stream: bool
) -> None:
    gateway = start(cluster=slow)
    before = until(slow, lambda told: not told.num_running)
    body = {**CHAT, "max_tokens": 400, "stream": stream, "return_token_ids": False}
    if stream:
        reply = gateway.post("/v1/chat/completions", body)
        next(reply.events())
        reply.close()
    else:
        with socket.create_connection(("127.0.0.1", int(gateway.http.rpartition(":")[2]))) as raw:
            data = json.dumps(body).encode()
            raw.sendall(ASK + b"content-length: %d\r\n\r\n" % len(data) + data)
            until(slow, lambda told: told.num_running)

    after = until(slow, lambda told: not told.num_running)
    ended = {
        name: after.finished_sequences[name] - before.finished_sequences[name] for name in after.finished_sequences
    }
    assert {name: count for name, count in ended.items() if count} == {"FINISH_REASON_ABORTED": 1}


def test_a_gateway_that_is_told_to_stop_ends_its_streams_first(start: Callable[..., Gateway], gateway: Gateway) -> None:
    whole = told(list(gateway.post("/v1/chat/completions", CHAT).events()))
    stopping = start()
    events = stopping.post("/v1/chat/completions", CHAT).events()
    heard = list(islice(events, 3))
    stopping.process.signal(signal.SIGTERM)
    heard += events

    assert told(heard) == whole
    assert stopping.process.wait() == 0


def test_a_gateway_that_may_not_wait_leaves_its_streams_to_the_next(
    start: Callable[..., Gateway], gateway: Gateway, slow: Cluster
) -> None:
    asked = {**CHAT, "max_tokens": 200}
    whole = told(list(gateway.post("/v1/chat/completions", asked).events()))
    stopping = start("--http-drain-s=0", cluster=slow)
    events = stopping.post("/v1/chat/completions", asked).events()
    heard = list(islice(events, 3))
    with stopping.client() as client:
        others = client.completions.create(
            model="", prompt="hi", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(others)
        stopping.process.signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the gateway stops") as broken:
            for _ in others:
                pass
    heard += events
    last = heard.pop()
    assert (last.id, last.data["error"]["code"]) == ("", "unavailable")
    assert not isinstance(broken.value, openai.APIConnectionError) and broken.value.code == "unavailable"
    assert stopping.process.wait() == 0

    heard += gateway.post("/v1/chat/completions", asked, {"last-event-id": heard[-1].id}).events()
    assert told(heard) == whole
