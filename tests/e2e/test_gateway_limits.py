"""What a gateway takes from strangers: how much, how fast, from whom."""

from __future__ import annotations

import http.client
import json
import select
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from services.api_keys import line_of, new_key
from tests.certificates import Authority
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.gateways import ASK, Gateway
from tests.e2e.programs import PAGEWIRE, run
from tests.house.manifests import containers_added

JSON = {"content-type": "application/json"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
LIMITS = (
    "--http-max-connections=3",
    "--http-max-head-bytes=2000",
    "--http-max-body-bytes=5000",
    "--http-unknown-fields=ignore",
    "--http-hosts=gpu.example",
)
HASTE = ("--http-head-s=0.5", "--http-body-s=0.3", "--http-reader-timeout-s=0.5", "--http-comment-s=0.1")
HANG_S = 120  # nothing here takes so long


@pytest.fixture(scope="module")
def narrow(shared: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that takes little of anything, and waits as long as any other."""
    with Gateway(shared.address, tmp_path_factory.mktemp("narrow") / "log", *LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(shared: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that waits for nobody. Only who is to be too slow may ask it: on a busy machine, anybody might be."""
    with Gateway(shared.address, tmp_path_factory.mktemp("hasty") / "log", *HASTE) as running:
        yield running


def dial(gateway: Gateway) -> socket.socket:
    """A connection that says nothing yet."""
    return socket.create_connection(("127.0.0.1", int(gateway.http.rpartition(":")[2])), timeout=HANG_S)


def heard(raw: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    parts: list[bytes] = []
    try:
        while part := raw.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def error_in(answer: bytes) -> tuple[int, str]:
    """Status and message of a raw answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.mark.parametrize("beginning", [b"", b"POST /v1/chat/completions HT", b"GET / HTTP/1.1\r\nhost: x\r\n"])
def test_a_connection_that_never_says_what_it_wants_is_closed(hasty: Gateway, beginning: bytes) -> None:
    with dial(hasty) as raw:
        raw.sendall(beginning)
        assert heard(raw) == b""


def test_the_second_request_of_a_connection_has_no_more_time_than_the_first(hasty: Gateway) -> None:
    with dial(hasty) as raw:
        raw.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\nGET /hea")
        answer = heard(raw)
    assert answer.startswith(b"HTTP/1.1 200 OK") and answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 3000 + b"\r\n\r\n", 431, "the head of a request has at most 2000 bytes"),
        (b"GET /" + b"y" * 3000 + b" HTTP/1.1\r\n\r\n", 431, "the head of a request has at most 2000 bytes"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "this is no HTTP request"),
        (ASK + b"content-length: 6000\r\n\r\n", 413,
         "the body of a request has at most 5000 bytes"),
        (ASK + b"transfer-encoding: chunked\r\n\r\n"
          b"1000\r\n" + b" " * 4096 + b"\r\n1000\r\n" + b" " * 4096 + b"\r\n0\r\n\r\n", 413,
         "the body of a request has at most 5000 bytes"),
    ],
    ids=["header", "path", "no HTTP", "announced", "in chunks"],
)  # fmt: skip
def test_a_request_that_is_too_large_is_told_so(narrow: Gateway, sent: bytes, status: int, message: str) -> None:
    with dial(narrow) as raw:
        raw.sendall(sent)
        assert error_in(heard(raw)) == (status, message)


def test_a_body_that_is_too_slow_is_told_so(hasty: Gateway) -> None:
    with dial(hasty) as raw:
        raw.sendall(ASK + b"content-length: 20\r\n\r\n{")
        assert error_in(heard(raw)) == (408, "the body did not come within 0.3 s")


def test_an_idle_connection_makes_room_and_a_busy_one_does_not(narrow: Gateway) -> None:
    def begin(raw: socket.socket) -> None:
        """A request whose body is waited for: who is told to go on is not idle any more."""
        raw.sendall(ASK + b"content-length: 20\r\nexpect: 100-continue\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 100")

    with dial(narrow) as first, dial(narrow) as second, dial(narrow) as third, dial(narrow) as fourth:
        assert heard(first) == b"", "the longest idle one"
        fourth.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert heard(fourth).startswith(b"HTTP/1.1 200")
        for raw in (second, third):
            begin(raw)
        with dial(narrow) as fifth:
            begin(fifth)
            with dial(narrow) as sixth:
                assert error_in(heard(sixth)) == (503, "too many connections are open")


def test_what_is_not_known_can_be_ignored(narrow: Gateway) -> None:
    assert narrow.post("/v1/chat/completions", {**CHAT, "temprature": 1}).status == 200


@pytest.mark.parametrize(
    ("name", "statuses"), [("rebind.evil.example", [403, 403, 403, 200]), ("gpu.example", [200, 200, 200, 200])]
)
def test_on_loopback_it_answers_to_its_own_names_alone(narrow: Gateway, name: str, statuses: list[int]) -> None:
    called = {"host": f"{name}:8000", "origin": f"http://{name}:8000"}  # as of a page that has its name mean 127.0.0.1
    replies = [narrow.post("/v1/chat/completions", CHAT, {**JSON, **called})]
    replies += [narrow.get(path, called) for path in ("/v1/models", "/metrics", "/health")]

    assert [reply.status for reply in replies] == statuses
    for reply in replies:
        reply.close()


def test_a_stream_that_nobody_reads_is_cut(hasty: Gateway) -> None:
    asked = {"prompt": [[1, 2]] * 8, "n": 8, "max_tokens": 490, "logprobs": 5, "ignore_eos": True, "stream": True}
    body = json.dumps(asked).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", int(hasty.http.rpartition(":")[2])))
        raw.sendall(ASK.replace(b"chat/", b"") + b"content-length: %d\r\n\r\n" % len(body) + body)
        cut = select.poll()
        cut.register(raw, 0)  # nothing but its end, whatever there is to read
        assert cut.poll(1000 * HANG_S)
        raw.settimeout(HANG_S)
        assert not heard(raw).endswith(b"0\r\n\r\n")


# ---- no room, nobody there


def test_without_a_scheduler_requests_end_soon_and_health_says_so(tmp_path: Path) -> None:
    with Gateway("127.0.0.1:1", tmp_path / "log", "--http-begin-patience-s=0.1") as gateway:
        with gateway.client() as client, pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model="", **CHAT)
        assert (refused.value.status_code, refused.value.code) == (503, "unavailable")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert "127.0.0.1" not in refused.value.message
        health = gateway.get("/health")
        assert health.status == 503 and health.json() == {"status": "not_serving"}


# ---- keys and TLS


class Keyed(NamedTuple):
    """A cluster that asks for keys; one of them, and that of a tenant who may ask for little."""

    cluster: Cluster
    key: str
    poor: str


@pytest.fixture(scope="module")
def keyed(fake_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder, (key, poor) = tmp_path_factory.mktemp("keyed"), (new_key(), new_key())
    little = line_of("poor", poor) + " tokens_per_s=1 burst_tokens=30"
    (folder / "keys").write_text(f"{line_of('acme', key)}\n{little}\n")
    with cluster(fake_folder, folder, flags=[f"--api-keys={folder / 'keys'}"]) as running:
        yield Keyed(running, key, poor)


def test_who_asks_for_too_much_hears_when_to_come_back(keyed: Keyed, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"model": "", "prompt": [1] * 20, "max_tokens": 4}
    with (
        Gateway(keyed.cluster.address, tmp_path / "log") as gateway,
        gateway.client(api_key=keyed.poor) as client,
    ):
        client.completions.create(**asked)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**asked)
    assert refused.value.code == "rate_limit_exceeded"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert float(refused.value.response.headers["retry-after-ms"]) > 0


def test_the_key_of_a_caller_is_the_key_that_the_scheduler_sees(keyed: Keyed, tmp_path: Path) -> None:
    running, key = keyed.cluster, keyed.key
    with Gateway(running.address, tmp_path / "log") as gateway:
        with gateway.client(api_key=key) as client:
            assert client.chat.completions.create(model="", **CHAT).choices[0].message.content
            assert len(client.models.list().data) == 1
        for wrong in ("pw-wrong", "with space", "é"):
            reply = gateway.post("/v1/chat/completions", CHAT, {"authorization": f"Bearer {wrong}"})
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
            error = reply.error()
            assert error["code"] == "invalid_api_key" and wrong not in error["message"]
        assert gateway.post("/v1/chat/completions", CHAT).status == 401
        assert gateway.get("/v1/models").status == 401
        assert gateway.get("/health").status == 200


def test_an_address_that_others_can_reach_needs_tls_and_a_scheduler_that_asks_for_keys(
    shared: Cluster, keyed: Keyed, authority: Authority, tmp_path: Path
) -> None:
    pair = authority.issue("gateway")
    tls = (f"--http-tls-cert={pair.cert}", f"--http-tls-key={pair.key}")

    bare = run(*PAGEWIRE, "gateway", "--address", shared.address, "--http=0.0.0.0:0")
    open_to_all = run(*PAGEWIRE, "gateway", "--address", shared.address, "--http=0.0.0.0:0", *tls)

    assert bare.code == 1 and "--http-tls-cert --http-tls-key" in bare.err
    assert open_to_all.code == 1 and "asks nobody for an API key" in open_to_all.err
    with Gateway(keyed.cluster.address, tmp_path / "log", "--http=0.0.0.0:0", *tls) as gateway:
        port = int(gateway.http.rpartition(":")[2])
        trust = ssl.create_default_context(cafile=str(authority.ca))
        raw = http.client.HTTPSConnection("localhost", port, context=trust, timeout=HANG_S)
        raw.request("POST", "/v1/chat/completions", json.dumps(CHAT), {**JSON, "authorization": f"Bearer {keyed.key}"})
        with raw.getresponse() as answer:
            assert answer.status == 200
            assert json.loads(answer.read())["choices"]
        raw.close()
        gateway.process.signal(signal.SIGTERM)
        assert gateway.process.wait() == 0


def test_a_gateway_that_never_saw_a_good_key_tells_prometheus_that_its_scheduler_is_gone(
    fake_folder: Path, authority: Authority, tmp_path: Path
) -> None:
    pair, key = authority.issue("gateway"), new_key()
    tls = (f"--http-tls-cert={pair.cert}", f"--http-tls-key={pair.key}")
    (tmp_path / "keys").write_text(f"{line_of('acme', key)}\n")
    trust = ssl.create_default_context(cafile=str(authority.ca))
    flags = [f"--api-keys={tmp_path / 'keys'}"]
    with (
        cluster(fake_folder, tmp_path, executors=0, flags=flags) as running,
        Gateway(
            running.address, tmp_path / "log", "--http=0.0.0.0:0", f"--http-admin={running.admin}", *tls
        ) as gateway,
    ):
        running.scheduler.signal(signal.SIGKILL)
        running.scheduler.wait()
        port = int(gateway.http.rpartition(":")[2])
        raw = http.client.HTTPSConnection("localhost", port, context=trust, timeout=HANG_S)
        raw.request("GET", "/metrics", headers={"authorization": f"Bearer {key}"})
        with raw.getresponse() as answer:
            assert answer.status == 200
            lines = answer.read().decode().splitlines()
        raw.close()

    assert "pagewire_gateway_scheduler_reachable 0" in lines and "pagewire_gateway_open_requests 0" in lines


def test_the_picker_of_a_pool_reads_without_a_key_what_the_scheduler_of_that_pod_does_and_gets_no_answer(
    fake_folder: Path, tmp_path: Path
) -> None:
    (added,) = containers_added("inference-pool")
    here = [word.replace("/run/pagewire", str(tmp_path)).replace(":8000", ":0") for word in added["args"]]
    address = next(word.removeprefix("--address=") for word in here if word.startswith("--address="))
    key = new_key()
    (tmp_path / "keys").write_text(f"{line_of('acme', key)}\n")
    flags = [f"--api-keys={tmp_path / 'keys'}", f"--local-listen={address}"]
    with (
        cluster(fake_folder, tmp_path, flags=flags) as running,
        Gateway(address, tmp_path / "log", *here[2:]) as gateway,
    ):
        assert here[0] == "gateway" and running.admin in here[-2]
        raw = http.client.HTTPConnection("localhost", int(gateway.http.rpartition(":")[2]), timeout=120)
        raw.request("GET", "/metrics")
        with raw.getresponse() as answer:
            lines = answer.read().decode().splitlines()
            assert answer.status == 200
        statuses: list[int] = []
        for headers in (JSON, {**JSON, "authorization": f"Bearer {key}"}):
            raw.request("POST", "/v1/chat/completions", json.dumps(CHAT), headers)
            with raw.getresponse() as answer:
                statuses.append(answer.status)
                answer.read()
        raw.close()

    assert {line.split()[0].partition("{")[0] for line in lines if line.startswith("vllm:")} == {
        "vllm:num_requests_waiting",
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:lora_requests_info",
    }
    assert statuses == [401, 200]


def test_keys_are_not_passed_on_in_the_clear(tmp_path: Path) -> None:
    ended = run(*PAGEWIRE, "gateway", "--address", "192.0.2.1:50051", "--http=127.0.0.1:0")

    assert ended.code == 1 and "without TLS: give --tls-ca" in ended.err
