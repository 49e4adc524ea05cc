"""What `docker compose up` opens to others, and that its images hold what they claim."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from common.config import ExecutorConfig, SchedulerConfig
from services.flags import add_flags, from_flags
from services.lifecycle import check_binds

ROOT = Path(__file__).resolve().parents[2]


def services(name: str = "docker-compose.yml") -> dict[str, Any]:
    """The services of a compose file, anchors resolved."""
    found: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())["services"]
    return found


def test_only_the_clients_ports_are_published_and_only_to_this_machine() -> None:
    ports = {name: service["ports"] for name, service in services().items() if "ports" in service}

    assert ports == {
        "scheduler": ["127.0.0.1:${PAGEWIRE_PORT-50051}:50051"],
        "gateway": ["127.0.0.1:${PAGEWIRE_HTTP_PORT-8000}:8000"],
    }


def test_every_container_gives_up_its_privileges() -> None:
    for service in services().values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_every_service_is_built_from_a_stage_that_exists() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    targets = {service["build"]["target"] for service in services().values()}

    assert targets == {"scheduler", "executor", "executor-gpu"}
    assert targets <= set(stages)


def test_the_final_images_do_not_run_as_root() -> None:
    stages = re.split(r"^FROM \S+ AS ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    users = {stage.split()[0]: re.findall(r"^USER (\S+)$", stage, flags=re.MULTILINE) for stage in stages}

    for name in ("scheduler", "executor", "executor-gpu"):
        assert users[name] == ["pagewire"]


def test_what_other_machines_can_reach_has_tls_and_keys() -> None:
    file = yaml.safe_load((ROOT / "docker-compose.tls.yml").read_text())
    scheduler = file["services"]["scheduler"]
    parser = argparse.ArgumentParser()
    add_flags(parser, SchedulerConfig, {})
    config = from_flags(SchedulerConfig, parser.parse_args(scheduler["command"][1:]))

    check_binds(config)
    assert not config.insecure
    for service in file["services"].values():
        mounted = {f"/run/secrets/{name}" for name in service["secrets"]}
        named = re.findall(r"/run/secrets/[\w.]+", yaml.safe_dump({**service, "secrets": []}))
        assert set(named) == mounted
        assert set(service["secrets"]) <= set(file["secrets"])
        assert set(service.get("environment", {})) <= {
            f"PAGEWIRE_{field.name.upper()}" for field in fields(ExecutorConfig)
        }
    assert set(file["services"]) <= set(services())


def test_a_container_is_killed_only_after_its_drain_and_hears_its_signal_at_once() -> None:
    last_words_s = 10  # after the drain: ends of calls, the step that runs
    drain_s = max(SchedulerConfig().drain_s, ExecutorConfig().drain_s)
    for name, service in services().items():
        assert service["init"], f"{name}: as process 1 it would not hear SIGTERM before it listens for it"
        if name != "model":
            assert int(service["stop_grace_period"].removesuffix("s")) >= drain_s + last_words_s
            assert "--drain-s" not in " ".join(service["command"])
    assert re.findall(r"^STOPSIGNAL (\S+)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE) == ["SIGTERM"]


def test_the_scheduler_stops_before_its_executors() -> None:
    """Compose stops in the reverse of the order in which it starts, and a drain needs executors."""
    found = services()

    assert "executor" in found["scheduler"]["depends_on"]
    assert not any("scheduler" in found[name]["depends_on"] for name in ("executor", "executor-gpu"))
