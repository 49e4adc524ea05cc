"""Keys, TLS and the operator's socket on real processes, and what they open to others by default."""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from common.config import ExecutorConfig, SchedulerConfig
from protos import executor_pb2, inference_pb2, monitoring_pb2
from protos import inference_pb2 as pb
from services.api_keys import new_key
from tests.certificates import Authority
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.programs import PAGEWIRE, run
from tests.e2e.sockets import listening

FILES = (inference_pb2, monitoring_pb2, executor_pb2, health_pb2, reflection_pb2)
METHODS = [
    method for file in FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods
]
HEALTH = "grpc.health.v1.Health"


class Keyed(NamedTuple):
    """A cluster that asks for keys, and the keys of its tenants."""

    cluster: Cluster
    keys: Path
    acme: str
    other: str


Metadata = tuple[tuple[str, str | bytes], ...]


def bearer(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


def add_key(path: Path, tenant: str) -> str:
    """What an operator does to let somebody in."""
    made = run(*PAGEWIRE, "api-key", tenant)
    assert made.code == 0
    with path.open("a") as file:
        file.write(made.out)
    (key,) = [word for word in made.err.split() if word.startswith("pw-")]
    return key


@pytest.fixture(scope="module")
def keyed(fake_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    keys = folder / "keys"
    acme, other = (add_key(keys, tenant) for tenant in ("acme", "other"))
    with cluster(fake_folder, folder, flags=["--api-keys", str(keys)]) as running:
        yield Keyed(running, keys, acme, other)


# ---- keys


def answer_of(channel: grpc.Channel, method: MethodDescriptor, metadata: Metadata) -> grpc.RpcError:
    """How the method ends for an empty message."""
    service = method.containing_service
    assert service is not None
    path = f"/{service.full_name}/{method.name}"
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)  # the wire tells no difference
    try:
        for _ in call(iter([b""]), metadata=metadata, timeout=20):
            raise AssertionError(f"{path} answered")
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"{path} ended well")


@pytest.mark.parametrize("metadata", [(), bearer(new_key()), bearer("")], ids=["none", "unknown", "empty"])
@pytest.mark.parametrize(
    "method",
    [m for m in METHODS if m.containing_service is not None and m.containing_service.full_name != HEALTH],
    ids=lambda m: m.full_name,
)
def test_no_method_but_health_answers_without_a_key(keyed: Keyed, method: MethodDescriptor, metadata: Metadata) -> None:
    error = answer_of(keyed.cluster.channel, method, metadata)

    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert error.details() == "an API key is needed: send it as metadata, authorization: Bearer KEY"


def test_the_methods_that_were_tried_are_all_that_are_served(keyed: Keyed) -> None:
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = keyed.cluster.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    )
    asked = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    (data,) = call(iter([asked]), metadata=bearer(keyed.acme), timeout=20)
    response = reflection_pb2.ServerReflectionResponse.FromString(data)
    served = {service.name for service in response.list_services_response.service}

    assert served <= {m.containing_service.full_name for m in METHODS if m.containing_service is not None}
    assert "pagewire.v1.InferenceService" in served
    assert "pagewire.v1.MonitoringService" not in served, "what is counted speaks of every tenant"


def test_health_needs_no_key(keyed: Keyed) -> None:
    ended = run(*PAGEWIRE, "health", keyed.cluster.address)

    assert (ended.code, ended.out) == (0, "SERVING\n")


def test_the_command_line_shows_its_key(keyed: Keyed, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{keyed.acme}\n")
    flags = ["--address", keyed.cluster.address, "--max-tokens=3", "--no-stats"]
    ended = run(*PAGEWIRE, "generate", *flags, "--api-key-file", str(tmp_path / "key"), "hi")
    assert (ended.code, ended.out) == (0, "9:;\n")

    ended = run(*PAGEWIRE, "generate", *flags, "hi")
    problem = f"error: {keyed.cluster.address} asks for an API key that it knows: give --api-key-file FILE\n"
    assert (ended.code, ended.out, ended.err) == (1, "", problem)


def test_a_tenant_finds_its_own_prompts_in_the_cache_and_no_other_tenants(keyed: Keyed) -> None:
    def cached(key: str) -> int:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=range(1, 101)),
            sampling=pb.SamplingParams(temperature=0),
            stopping=pb.StopConditions(max_tokens=1),
        )
        answer = keyed.cluster.stub.Generate(request, metadata=bearer(key), timeout=60)
        return answer.choices[0].usage.cached_prompt_tokens

    assert [cached(keyed.acme), cached(keyed.other)] == [0, 0]
    assert [cached(keyed.acme), cached(keyed.other)] == [99, 99]


def test_a_file_of_keys_that_cannot_be_used_is_one_line(fake_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("acme pw-not-a-hash\n")
    ended = run(*PAGEWIRE, "scheduler", "--model", str(fake_folder), "--api-keys", str(tmp_path / "keys"))

    assert ended.code == 1
    assert ended.err.startswith(f"error: {tmp_path}/keys, line 1: after acme a hash is needed")
    assert ended.err.count("\n") == 1 and "not-a-hash" not in ended.err


# ---- TLS


@contextmanager
def encrypted(fake_folder: Path, folder: Path, authority: Authority) -> Iterator[Cluster]:
    """A cluster whose links are TLS: clients are shown a certificate, executors show one, too."""
    server, link = authority.issue("server"), authority.issue("link")
    flags = [
        *("--tls-cert", str(server.cert), "--tls-key", str(server.key), "--link-listen", "127.0.0.1:0"),
        *("--link-tls-cert", str(link.cert), "--link-tls-key", str(link.key), "--link-tls-ca", str(authority.ca)),
    ]
    with cluster(fake_folder, folder, executors=0, flags=flags) as running:
        yield running


def test_everything_works_over_tls_and_nothing_without_it(
    fake_folder: Path, tmp_path: Path, authority: Authority, stranger: Authority
) -> None:
    with encrypted(fake_folder, tmp_path, authority) as running:
        own = authority.issue("executor")
        identity = ["--link-tls-cert", str(own.cert), "--link-tls-key", str(own.key)]
        running.start_executor("--link-tls-ca", str(authority.ca), *identity)
        flags = ["--address", running.address.replace("127.0.0.1", "localhost"), "--max-tokens=3", "--no-stats"]

        ended = run(*PAGEWIRE, "generate", *flags, "--tls-ca", str(authority.ca), "hi")
        assert (ended.code, ended.out, ended.err) == (0, "9:;\n", "")
        for wrong in ([], ["--tls-ca", str(stranger.ca)], ["--tls-ca", "system"]):
            ended = run(*PAGEWIRE, "generate", *flags, *wrong, "hi")
            assert (ended.code, ended.out) == (1, ""), wrong
            assert "error: no connection to localhost:" in ended.err
        ended = run(*PAGEWIRE, "health", running.address, "--tls-ca", str(authority.ca))
        assert ended.out == "SERVING\n"

        method = executor_pb2.DESCRIPTOR.services_by_name["ExecutorLink"].methods_by_name["Link"]
        trusted, key, cert = (path.read_bytes() for path in (authority.ca, own.key, own.cert))
        for credentials in (None, grpc.ssl_channel_credentials(trusted)):
            with _channel(running.link, credentials) as channel:
                assert answer_of(channel, method, ()).code() is grpc.StatusCode.UNAVAILABLE
        with _channel(running.link, grpc.ssl_channel_credentials(trusted, key, cert)) as channel:
            assert answer_of(channel, method, ()).code() is grpc.StatusCode.INVALID_ARGUMENT, "it got as far as hello"


def _channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    return grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)


def test_an_expired_certificate_stops_the_start_with_its_date(
    fake_folder: Path, tmp_path: Path, authority: Authority
) -> None:
    pair = authority.issue("expired", days=0)
    flags = ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--listen=127.0.0.1:0"]
    ended = run(*PAGEWIRE, "scheduler", "--model", str(fake_folder), *flags)

    assert ended.code == 1
    assert ended.err.startswith(f"error: {pair.cert}: expired on ")


def test_a_key_is_not_sent_in_the_clear_to_another_machine(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(new_key())
    ended = run(*PAGEWIRE, "generate", "--address", "192.0.2.1:1", "--api-key-file", str(tmp_path / "key"), "hi")

    problem = "error: the API key is not sent to 192.0.2.1:1 without TLS: give --tls-ca\n"
    assert (ended.code, ended.err) == (1, problem)


def test_a_file_that_holds_more_than_a_key_is_not_repeated(shared: Cluster, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a secret\nand another")
    flags = ["--address", shared.address, "--api-key-file", str(tmp_path / "key")]
    ended = run(*PAGEWIRE, "generate", *flags, "hi")

    assert ended.code == 1
    assert ended.err == "error: the API key is not printable ASCII: the file must hold the key and nothing else\n"


# ---- what is open by default


def without_port(address: str) -> str:
    """The same host, and a port that is free."""
    return f"{address.rpartition(':')[0]}:0"


def test_by_default_nothing_can_be_reached_from_another_machine(
    fake_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    defaults = SchedulerConfig()
    flags = [
        *("--listen", without_port(defaults.listen), "--link-listen", without_port(defaults.link_listen)),
        f"--admin-listen={defaults.admin_listen}",
    ]
    with cluster(fake_folder, tmp_path, executors=0, flags=flags) as running:
        executor = running.start_executor()
        open_to = {address.rpartition(":")[0] for address in listening(running.scheduler.popen.pid)}
        assert {*open_to} and all(ipaddress.ip_address(host).is_loopback for host in open_to)
        assert listening(running.scheduler.popen.pid) == {running.address, running.link}
        assert listening(executor.popen.pid) == set(), "an executor dials, and is never dialed"
        assert ExecutorConfig().scheduler == defaults.link_listen

        socket = Path(running.admin.removeprefix("unix:"))
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        ended = run(*PAGEWIRE, "status", running.address)
        assert ended.code == 0 and ended.out.startswith("scheduler: up ")


def test_the_scan_sees_what_others_can_reach(fake_folder: Path, tmp_path: Path) -> None:
    flags = ["--listen=0.0.0.0:0", "--insecure"]
    with cluster(fake_folder, tmp_path, executors=0, flags=flags) as running:
        (found,) = listening(running.scheduler.popen.pid)
        assert found in {running.address, running.address.replace("0.0.0.0", "::")}


def test_no_process_leaves_its_memory_in_a_core_file(shared: Cluster) -> None:
    for process in (shared.scheduler, *shared.executors):
        proc = Path(f"/proc/{process.popen.pid}")
        (limit,) = [
            line for line in (proc / "limits").read_text().splitlines() if line.startswith("Max core file size")
        ]
        assert limit.split()[4:6] == ["0", "0"]
        assert int((proc / "coredump_filter").read_text(), 16) == 0


# ---- what is never told


CANARY = "Canary7Q"


def test_no_prompt_and_no_key_is_ever_logged_or_sent_back(fake_folder: Path, tmp_path: Path) -> None:
    """Whatever happens to a request, at the loudest: its words are in no log, no status and no counter."""
    keys = tmp_path / "keys"
    key = add_key(keys, "acme")
    flags = ["--api-keys", str(keys), "--log-level=debug"]
    told: list[str] = []
    with cluster(fake_folder, tmp_path, executors=0, flags=flags) as running:
        dying = running.start_executor("--log-level=debug", "--fake-step-s=0.02")
        channel, metadata = running.channel, bearer(key)

        def call(method: str, data: bytes, metadata: Metadata = metadata) -> bool:
            stream: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
                f"/pagewire.v1.InferenceService/{method}"
            )
            try:
                list(stream(data, metadata=metadata, timeout=30))
            except grpc.RpcError as error:
                told.append(f"{error.code()} {error.details()} {error.trailing_metadata()}")
                return False
            return True

        def ask(**fields: object) -> bool:
            stopping = pb.StopConditions(max_tokens=3, stop=[CANARY])
            request = pb.GenerateStreamRequest(**{"stopping": stopping, "text": CANARY, **fields})  # type: ignore[arg-type]
            return call("GenerateStream", request.SerializeToString())

        chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=CANARY)])
        assert ask() and ask(chat=chat)
        assert call("Tokenize", pb.TokenizeRequest(text=CANARY).SerializeToString())
        refused = [
            ask(sampling=pb.SamplingParams(temperature=-1)),
            ask(text=CANARY * 1000),
            ask(stopping=pb.StopConditions(max_tokens=3, stop=[CANARY * 100])),
            ask(stopping=pb.StopConditions(max_tokens=100_000, stop=[CANARY])),
            ask(chat=pb.ChatMessages(messages=[pb.ChatMessage(content=CANARY)])),
            ask(token_ids=pb.TokenIds(ids=[9999])),
            ask(request_id=f"{CANARY} with spaces"),
            call("GenerateStream", b"\x0a\x7f" + CANARY.encode()),
            call("Generate", b"\xff" * 9 + CANARY.encode()),
            call("NoSuchMethod", CANARY.encode()),
            call("GenerateStream", CANARY.encode() * (5 << 17)),
            call("Generate", b"", bearer(f"pw-{CANARY}{'x' * 35}")),
            call("Generate", b"", (("authorization", f"{key} {CANARY}"),)),
        ]
        assert not any(refused) and len(told) == len(refused)
        model = pb.GenerateRequest(model=CANARY, text=CANARY).SerializeToString()
        assert not call("Generate", model) and CANARY in told.pop(), (
            "a caller's own model is named, to the caller alone"
        )

        # an executor that is lost in the middle, and a caller who leaves
        long = pb.GenerateStreamRequest(text=CANARY, stopping=pb.StopConditions(max_tokens=200, ignore_eos=True))
        streams = [running.stub.GenerateStream(long, metadata=metadata, timeout=60) for _ in range(2)]
        for stream in streams:
            next(stream)
            next(stream)
        dying.popen.kill()
        running.start_executor("--log-level=debug")
        streams[0].cancel()
        assert [m for m in streams[1] if m.HasField("finish")]
        told.append(run(*PAGEWIRE, "status", running.admin).out)
        running.scheduler.popen.terminate()
        assert running.scheduler.wait() == 0
        logs = {process.log.name: process.log.read_text() for process in (running.scheduler, *running.executors)}

    for name, text in {**logs, **{f"status {i}": text for i, text in enumerate(told)}}.items():
        assert CANARY not in text, name
        assert key[3:] not in text, name
    assert " D " in logs["scheduler.log"], "it was at its loudest"
    assert "joined" in logs["scheduler.log"] and "is gone" in logs["scheduler.log"]
