"""What `docker compose up` opens to others, and that its images hold what they claim."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


def services() -> dict[str, Any]:
    """The services of docker-compose.yml, anchors resolved."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return found


def test_only_the_client_port_is_published_and_only_to_this_machine() -> None:
    ports = {name: service["ports"] for name, service in services().items() if "ports" in service}

    assert ports == {"scheduler": ["127.0.0.1:${PAGEWIRE_PORT-50051}:50051"]}


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
