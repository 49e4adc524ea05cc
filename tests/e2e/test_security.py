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
from smg_grpc_proto.generated import vllm_engine_pb2

from common.config import ExecutorConfig, SchedulerConfig
from pagewire import Client, Unauthenticated
from protos import executor_pb2, inference_pb2, monitoring_pb2, open_inference_pb2, open_inference_pb2_grpc
from protos import inference_pb2 as pb
from services.api_keys import new_key
from tests.certificates import Authority
from tests.e2e.cluster import Cluster, cluster, until_error
from tests.e2e.programs import PAGEWIRE, run
from tests.e2e.sockets import listening

FILES = (
    inference_pb2,
    vllm_engine_pb2,
    open_inference_pb2,
    monitoring_pb2,
    executor_pb2,
    health_pb2,
    reflection_pb2,
)
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
    flags = ["--api-keys", str(keys), "--vllm-api", "--open-inference"]
    with cluster(fake_folder, folder, flags=flags) as running:
        yield Keyed(running, keys, acme, other)


# ---- keys


def answer_of(channel: grpc.Channel, method: MethodDescriptor, metadata: Metadata) -> grpc.RpcError:
    """How the method ends for an empty message."""
    service = method.containing_service
    assert service is not None
    path = f"/{service.full_name}/{method.name}"
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)  # the wire tells no difference
    try:
        for _ in call(iter([b""]), metadata=metadata, timeout=60):
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
    (data,) = call(iter([asked]), metadata=bearer(keyed.acme), timeout=60)
    response = reflection_pb2.ServerReflectionResponse.FromString(data)
    served = {service.name for service in response.list_services_response.service}

    assert served <= {m.containing_service.full_name for m in METHODS if m.containing_service is not None}
    ours = {"pagewire.v1.InferenceService", "vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService"}
    assert ours <= served
    assert "pagewire.v1.MonitoringService" not in served, "what is counted speaks of every tenant"


def test_health_needs_no_key(keyed: Keyed) -> None:
    ended = run(*PAGEWIRE, "health", keyed.cluster.address)

    assert (ended.code, ended.out) == (0, "SERVING\n")


def test_watching_health_is_bounded_and_asking_for_it_is_not(fake_folder: Path, tmp_path: Path) -> None:
    with cluster(fake_folder, tmp_path, flags=["--max-health-watches=2"]) as running:
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = running.channel.unary_stream(f"/{HEALTH}/Watch")
        first = method(b"", timeout=60)
        assert health_pb2.HealthCheckResponse.FromString(next(first)).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            next(method(b"", timeout=60))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert run(*PAGEWIRE, "health", running.address).out == "SERVING\n"
        first.cancel()


def test_the_command_line_shows_its_key(keyed: Keyed, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{keyed.acme}\n")
    flags = ["--address", keyed.cluster.address, "--max-tokens=3", "--no-stats"]
    ended = run(*PAGEWIRE, "generate", *flags, "--api-key-file", str(tmp_path / "key"), "hi")
    assert (ended.code, ended.out) == (0, "9:;\n")

    ended = run(*PAGEWIRE, "generate", *flags, "hi")
    problem = f"error: {keyed.cluster.address} asks for an API key that it knows: give --api-key-file FILE\n"
    assert (ended.code, ended.out, ended.err) == (1, "", problem)


def test_the_open_inference_protocol_is_served_to_the_same_tenants(keyed: Keyed) -> None:
    stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(keyed.cluster.channel)
    request = open_inference_pb2.ModelInferRequest(model_name="fake")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hello")
    request.parameters["max_tokens"].int64_param = 4
    response = stub.ModelInfer(request, metadata=bearer(keyed.acme), timeout=60)
    assert response.outputs[0].contents.bytes_contents == [b"&'()"]

    (told,) = stub.ModelStreamInfer(iter([request]), metadata=bearer(keyed.acme), timeout=60)
    assert told.infer_response.outputs[0].contents.bytes_contents == [b"&'()"]


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


def test_a_key_that_is_withdrawn_ends_its_open_streams_and_no_others(fake_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    acme = add_key(keys, "acme")
    without_other = keys.read_text()
    other = add_key(keys, "other")

    def stream(key: str, max_tokens: int) -> Iterator[pb.GenerateStreamResponse]:
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=[1, 2, 3]),
            sampling=pb.SamplingParams(temperature=0),
            stopping=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        )
        return iter(running.stub.GenerateStream(request, metadata=bearer(key), timeout=120))

    with cluster(fake_folder, tmp_path, executors=0, flags=["--api-keys", str(keys)]) as running:
        running.start_executor("--fake-step-s=0.04")
        kept, withdrawn = stream(acme, 200), stream(other, 500)
        tokens = [token for _ in range(3) for token in next(kept).delta.token_ids]
        for _ in range(3):
            next(withdrawn)
        keys.write_text(without_other)
        _, error = until_error(withdrawn)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        with Client(running.address, api_key=other) as client, pytest.raises(Unauthenticated):
            client.generate("hi")
        for message in kept:
            tokens += message.delta.token_ids
        assert tokens == list(range(3, 203))


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
        with Client(flags[1], tls_ca=authority.ca) as client:
            assert client.generate(messages=[{"role": "user", "content": "hi"}], max_tokens=3).text == "9:;"
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


def test_a_key_is_not_sent_in_the_clear_to_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(new_key())
    flags = ["--address", "192.0.2.1:1"]
    ended = run(*PAGEWIRE, "generate", *flags, "--api-key-file", str(tmp_path / "key"), "hi")
    problem = "error: the API key is not sent to 192.0.2.1:1 without TLS: give --tls-ca, or --insecure\n"
    assert (ended.code, ended.err) == (1, problem)

    monkeypatch.setenv("PAGEWIRE_API_KEY", new_key())
    ended = run(*PAGEWIRE, "generate", *flags, "hi")
    assert (ended.code, ended.err) == (1, problem)


def test_the_command_line_and_the_client_take_the_key_of_the_environment(
    keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEWIRE_API_KEY", keyed.acme)
    ended = run(*PAGEWIRE, "generate", "--address", keyed.cluster.address, "--max-tokens=3", "--no-stats", "hi")
    assert (ended.code, ended.out) == (0, "9:;\n")
    with Client(keyed.cluster.address) as client:
        assert client.generate(messages=[{"role": "user", "content": "hi"}], max_tokens=3).text == "9:;"
    with Client(keyed.cluster.address, api_key=new_key()) as client, pytest.raises(Unauthenticated):
        client.generate("hi")


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


# ---- what starts, and what does not


@pytest.mark.parametrize(
    ("command", "flags", "needed"),
    [
        ("scheduler", ["--listen=0.0.0.0:0"], "--tls-cert --tls-key --api-keys"),
        ("scheduler", ["--listen=[::]:0", "TLS"], "--api-keys"),
        ("scheduler", ["--listen=0.0.0.0:0", "KEYS"], "--tls-cert --tls-key"),
        ("scheduler", ["--link-listen=0.0.0.0:0"], "--link-tls-cert --link-tls-key --link-tls-ca"),
        ("scheduler", ["--link-listen=0.0.0.0:0", "TLS", "KEYS"], "--link-tls-cert --link-tls-key --link-tls-ca"),
        ("serve", ["--listen=0.0.0.0:0", "--fake"], "--tls-cert --tls-key --api-keys"),
    ],
)
def test_what_others_could_reach_does_not_start_unprotected(
    command: str, flags: list[str], needed: str, protected: dict[str, list[str]], fake_folder: Path
) -> None:
    spelled = [flag for word in flags for flag in protected.get(word, [word])]
    ended = run(*PAGEWIRE, command, "--model", str(fake_folder), *spelled)

    assert ended.code == 1
    (line,) = ended.err.splitlines()[-1:]
    assert line.startswith("error: ") and f"can be reached from other machines. Protect it with {needed}, bind" in line


@pytest.mark.parametrize(
    "flags",
    [
        ["--listen=0.0.0.0:0", "TLS", "KEYS"],
        ["--link-listen=0.0.0.0:0", "LINK"],
        ["--listen=0.0.0.0:0", "--link-listen=0.0.0.0:0", "--insecure"],
        ["--listen=127.0.0.1:0", "--link-listen=127.0.0.1:0", "TLS", "KEYS", "LINK"],
    ],
    ids=" ".join,
)
def test_what_is_protected_or_typed_starts_and_opens_just_that(
    flags: list[str], protected: dict[str, list[str]], fake_folder: Path, tmp_path: Path
) -> None:
    spelled = [flag for word in flags for flag in protected.get(word, [word])]
    with cluster(fake_folder, tmp_path, executors=0, flags=spelled) as running:
        hosts = {address.rpartition(":")[0] for address in listening(running.scheduler.popen.pid)}
        is_open = any(flag.endswith("listen=0.0.0.0:0") for flag in flags)
        assert bool(hosts & {"0.0.0.0", "::"}) is is_open
        assert stat.S_ISSOCK(Path(running.admin.removeprefix("unix:")).stat().st_mode)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0"])
def test_the_operators_socket_is_on_no_network_whatever_is_typed(address: str, fake_folder: Path) -> None:
    flags = ["--listen=127.0.0.1:0", "--insecure", f"--admin-listen={address}"]
    ended = run(*PAGEWIRE, "scheduler", "--model", str(fake_folder), *flags)

    assert ended.code == 1
    assert ended.err.splitlines()[-1] == f"error: --admin-listen {address}: give unix:PATH, or none"


@pytest.fixture(scope="module")
def protected(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Flags by a word: what protects clients, and what protects the link."""
    pair, keys = authority.issue("protected"), tmp_path_factory.mktemp("protected") / "keys"
    add_key(keys, "acme")
    return {
        "TLS": [f"--tls-cert={pair.cert}", f"--tls-key={pair.key}"],
        "KEYS": [f"--api-keys={keys}"],
        "LINK": [f"--link-tls-cert={pair.cert}", f"--link-tls-key={pair.key}", f"--link-tls-ca={authority.ca}"],
    }
