"""Envoy in front of two schedulers, by deploy/envoy/envoy.yaml: streams go on while these are killed and drained.

The file is used as it stands but for hosts, ports and the places of certificates.
"""

from __future__ import annotations

# ruff: noqa: E402 - what follows the skip
from tests.clients.needed import needs

needs("envoy")

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from pagewire import AsyncClient, Client
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from services.api_keys import line_of, new_key
from tests.certificates import Authority
from tests.e2e.cluster import ROOT
from tests.e2e.fleets import Fleet, Readers

CONFIG = ROOT / "deploy" / "envoy" / "envoy.yaml"
STREAMS = 8
START_S = 120.0


class Envoy:
    """The proxy in a process of its own, and what its admin page says."""

    def __init__(self, schedulers: list[str], folder: Path, authority: Authority) -> None:
        pair = authority.issue("envoy")
        config = yaml.safe_load(
            CONFIG.read_text()
            .replace("/secrets/tls/tls.crt", str(pair.cert))
            .replace("/secrets/tls/tls.key", str(pair.key))
            .replace("/secrets/tls/ca.crt", str(authority.ca))
        )
        config["admin"]["address"]["socket_address"]["port_value"] = 0
        (listener,), (cluster,) = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
        listener["address"]["socket_address"] |= {"address": "127.0.0.1", "port_value": 0}
        (locality,) = cluster["load_assignment"]["endpoints"]
        for endpoint, scheduler in zip(locality["lb_endpoints"], schedulers, strict=True):
            port = int(scheduler.rpartition(":")[2])
            endpoint["endpoint"]["address"]["socket_address"] = {"address": "localhost", "port_value": port}
        file, self._admin_file, self.log = folder / "envoy.yaml", folder / "admin", folder / "envoy.log"
        file.write_text(yaml.safe_dump(config))
        program = Path(sys.executable).with_name("envoy")
        flags = ["--concurrency", "1", "--use-dynamic-base-id", "--admin-address-path", str(self._admin_file)]
        with self.log.open("wb") as log:
            self._popen = subprocess.Popen(
                [program, "-c", file, *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.address = ""

    async def start(self) -> None:
        """Return when both schedulers are healthy; `address` is where clients find it."""
        async with asyncio.timeout(START_S):
            await self.until(lambda: len(self.healthy()) == 2)
        listeners = self._ask("listeners")["listener_statuses"]
        self.address = f"localhost:{listeners[0]['local_address']['socket_address']['port_value']}"

    async def until(self, so: Callable[[], bool]) -> None:
        """Return once it is so."""
        async with asyncio.timeout(START_S):
            while not self._is_up() or not so():
                await asyncio.sleep(0.02)

    def healthy(self) -> set[int]:
        """Ports of the schedulers that get what is new."""
        return {
            port
            for port, host in self._hosts().items()
            if host["health_status"]["eds_health_status"] == "HEALTHY"
            and not host["health_status"].get("failed_active_health_check")
            and not host["health_status"].get("failed_outlier_check")
        }

    def requests(self) -> Counter[int]:
        """How many requests each scheduler got, by its port."""
        return Counter(
            {
                port: int(stat.get("value", 0))
                for port, host in self._hosts().items()
                for stat in host["stats"]
                if stat["name"] == "rq_total"
            }
        )

    def close(self) -> None:
        """Kill it."""
        self._popen.kill()
        self._popen.wait()

    def _is_up(self) -> bool:
        assert self._popen.poll() is None, self.log.read_text()
        return self._admin_file.exists() and self._admin_file.read_text().strip() != ""

    def _hosts(self) -> Mapping[int, Any]:
        (cluster,) = self._ask("clusters")["cluster_statuses"]
        return {host["address"]["socket_address"]["port_value"]: host for host in cluster.get("host_statuses", ())}

    def _ask(self, page: str) -> Any:
        with urllib.request.urlopen(f"http://{self._admin_file.read_text()}/{page}?format=json", timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def key() -> str:
    """An API key that both schedulers know."""
    return new_key()


@pytest.fixture(scope="module")
def fleets(
    key: str, fake_folder: Path, tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[list[Fleet]]:
    """Two schedulers with TLS and API keys, which sign tickets with the same key; an executor each."""
    folder, pair = tmp_path_factory.mktemp("fleets"), authority.issue("scheduler")
    (folder / "keys").write_text(line_of("acme", key) + "\n")
    more = [
        f"--tls-cert={pair.cert}",
        f"--tls-key={pair.key}",
        f"--api-keys={folder}/keys",
        "--health-listen=127.0.0.1:0",
    ]
    started: list[Fleet] = []
    try:
        for name in ("a", "b"):
            ticket_keys = folder / "ticket-keys"
            started.append(Fleet.start(fake_folder, folder / name, ticket_keys=ticket_keys, num_executors=1, more=more))
        yield started
    finally:
        for fleet in started:
            fleet.close()


@pytest.fixture(scope="module")
def envoy(fleets: list[Fleet], tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Envoy]:
    """Envoy, which has found both schedulers."""
    running = Envoy([fleet.cluster.address for fleet in fleets], tmp_path_factory.mktemp("envoy"), authority)
    try:
        asyncio.run(running.start())
        yield running
    finally:
        running.close()


def port_of(fleet: Fleet) -> int:
    return int(fleet.cluster.address.rpartition(":")[2])


def test_envoy_has_nothing_against_the_file(envoy: Envoy) -> None:
    assert [line for line in envoy.log.read_text().splitlines() if "[warning]" in line or "[error]" in line] == []


def test_a_conversation_stays_with_one_scheduler(envoy: Envoy, key: str, authority: Authority) -> None:
    def asked(number: int) -> set[int]:
        before, session = envoy.requests(), (("x-session-id", f"session-{number}"),)
        with Client(envoy.address, api_key=key, tls_ca=authority.ca, metadata=session) as client:
            for _ in range(4):
                client.generate(token_ids=[1, 2], max_tokens=1)
        return set(envoy.requests() - before)

    assert all(len(asked(number)) == 1 for number in range(4))


def test_what_a_scheduler_refuses_reaches_its_caller_as_it_is(envoy: Envoy, key: str, authority: Authority) -> None:
    before = envoy.requests()
    with grpc.secure_channel(envoy.address, grpc.ssl_channel_credentials(authority.ca.read_bytes())) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for metadata, code in (((), "UNAUTHENTICATED"), ((("authorization", f"Bearer {key}"),), "NOT_FOUND")):
            with pytest.raises(grpc.RpcError) as refused:
                stub.GetModel(pb.GetModelRequest(model="another"), metadata=metadata, timeout=60)
            assert refused.value.code().name == code

    assert (envoy.requests() - before).total() == 2, "neither is sent again"


# The last one: processes that its threads have started end with them.
def test_streams_go_on_while_schedulers_are_killed_drained_and_replaced(
    fleets: list[Fleet], envoy: Envoy, key: str, fake_folder: Path, authority: Authority
) -> None:
    first, second = fleets
    readers = Readers(fake_folder)

    async def scenario() -> None:
        async with (
            AsyncClient(envoy.address, api_key=key, tls_ca=authority.ca) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for _ in range(STREAMS):
                tasks.create_task(readers.read(client))
            before = envoy.requests()
            await readers.answers(2)
            assert len(envoy.requests() - before) == 2, "both have some"

            await asyncio.to_thread(first.kill_scheduler)
            await envoy.until(lambda: envoy.healthy() == {port_of(second)})
            await readers.answers(4)
            await asyncio.to_thread(first.start_scheduler)
            await envoy.until(lambda: len(envoy.healthy()) == 2)

            for fleet in fleets:  # a rolling restart: the next one when the last one is seen to be back
                await asyncio.to_thread(fleet.replace_scheduler)
                await envoy.until(lambda: len(envoy.healthy()) == 2)
                await readers.answers(2)
            readers.is_over = True

    asyncio.run(scenario())

    assert first.num_handed_over + second.num_handed_over > 0, "the grace was too long for anything to be shown"
