"""What `docker compose up` opens to others, and that its images hold what they claim."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import ExecutorConfig, SchedulerConfig
from services.flags import add_flags, from_flags
from services.lifecycle import check_binds

ROOT = Path(__file__).resolve().parents[2]
OBSERVABILITY = ROOT / "deploy" / "observability"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def services(name: str = "docker-compose.yml") -> dict[str, Any]:
    """The services of a compose file, anchors resolved."""
    found: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())["services"]
    return found


def test_only_the_clients_ports_are_published_and_only_to_this_machine() -> None:
    ports = {name: service["ports"] for name, service in services().items() if "ports" in service}

    assert ports == {
        "scheduler": ["127.0.0.1:${PAGEWIRE_PORT-50051}:50051"],
        "gateway": ["127.0.0.1:${PAGEWIRE_HTTP_PORT-8000}:8000"],
        "smg": ["127.0.0.1:${SMG_PORT-30000}:30000"],
        "prometheus": ["127.0.0.1:${PROMETHEUS_PORT-9090}:9090"],
        "grafana": ["127.0.0.1:${GRAFANA_PORT-3000}:3000"],
    }


def test_a_gateway_that_asks_nobody_for_a_key_is_called_by_names_of_this_machine_and_of_its_network_alone() -> None:
    command = services()["gateway"]["command"]

    assert "--insecure" in command and "--http-hosts=gateway" in command


def test_every_container_gives_up_its_privileges() -> None:
    for service in services().values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_every_service_is_built_from_a_stage_that_exists() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    targets = {service["build"]["target"] for service in services().values() if "build" in service}
    fetched = {name: service["image"] for name, service in services().items() if "build" not in service}

    assert targets == {"scheduler", "executor", "executor-gpu", "smg"}
    assert targets <= set(stages)
    assert set(fetched) == {"prometheus", "grafana"}
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in fetched.values()), "another's are of one version"


def test_the_final_images_do_not_run_as_root() -> None:
    stages = re.split(r"^FROM \S+ AS ", DOCKERFILE, flags=re.MULTILINE)[1:]
    users = {stage.split()[0]: re.findall(r"^USER (\S+)$", stage, flags=re.MULTILINE) for stage in stages}

    for name in ("scheduler", "executor", "executor-gpu", "smg"):
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
        said = yaml.safe_dump({**service, "secrets": []}) + "".join(
            (OBSERVABILITY / Path(path).name).read_text()
            for path in re.findall(r"/etc/prometheus/\S+", " ".join(service.get("command", ())))
        )
        named = re.findall(r"/run/secrets/[\w.-]+", said)
        assert set(named) == mounted
        assert set(service["secrets"]) <= set(file["secrets"])
        assert set(service.get("environment", {})) <= {
            f"PAGEWIRE_{field.name.upper()}" for field in fields(ExecutorConfig)
        }
    assert set(file["services"]) <= set(services())


@pytest.mark.parametrize(
    ("name", "instead"), [("scheduler", {"--insecure"}), ("gateway", {"--insecure", "--http-hosts=gateway"})]
)
def test_with_tls_a_command_says_whatever_it_says_without(name: str, instead: set[str]) -> None:
    """Compose does not merge commands: what one file says and the other does not, TLS would take away.

    It stands for what is `instead` of it: a page of another site, whose name means this machine, has no certificate.
    """
    plain, tls = set(services()[name]["command"]), set(services("docker-compose.tls.yml")[name]["command"])

    assert plain - tls == instead
    assert all("-tls-" in word or word.startswith("--api-keys=") for word in tls - plain)


def test_a_container_is_killed_only_after_its_drain_and_hears_its_signal_at_once() -> None:
    last_words_s = 10  # after the drain: ends of calls, the step that runs
    drain_s = max(SchedulerConfig().drain_s, ExecutorConfig().drain_s)
    for name, service in services().items():
        assert service["init"], f"{name}: as process 1 it would not hear SIGTERM before it listens for it"
        if name != "model":
            assert int(service["stop_grace_period"].removesuffix("s")) >= drain_s + last_words_s
            assert "--drain-s" not in " ".join(service.get("command", ()))
    assert re.findall(r"^STOPSIGNAL (\S+)$", DOCKERFILE, flags=re.MULTILINE) == ["SIGTERM"]


def test_what_is_not_needed_by_all_is_started_only_where_it_is_asked_for() -> None:
    profiles = {name: service["profiles"] for name, service in services().items() if "profiles" in service}

    assert profiles == {
        "executor-gpu": ["gpu"],
        "smg": ["smg"],
        "prometheus": ["observability"],
        "grafana": ["observability"],
    }


def test_the_gateway_finds_the_operators_socket_of_the_scheduler() -> None:
    """By default it lies in the user's runtime folder: the two containers share that, and the user."""
    scheduler, gateway = services()["scheduler"], services()["gateway"]
    runtime = Path(scheduler["environment"]["XDG_RUNTIME_DIR"])
    (listen,) = [word for word in scheduler["command"] if word.startswith("--listen=")]
    port = listen.rpartition(":")[2]

    for file in ("docker-compose.yml", "docker-compose.tls.yml"):
        assert f"--http-admin=unix:{runtime}/pagewire/admin-{port}.sock" in services(file)["gateway"]["command"]
    assert f"runtime:{runtime}" in scheduler["volumes"]
    assert f"runtime:{runtime}:ro" in gateway["volumes"]


@pytest.mark.parametrize("tls", [False, True])
def test_prometheus_asks_the_gateway_as_it_answers(tls: bool) -> None:
    overlay = services("docker-compose.tls.yml") if tls else {}
    command = {**services()["prometheus"], **overlay.get("prometheus", {})}["command"]
    (path,) = [word.partition("=")[2] for word in command if word.startswith("--config.file=")]
    (job,) = yaml.safe_load((OBSERVABILITY / Path(path).name).read_text())["scrape_configs"]
    gateway = {**services()["gateway"], **overlay.get("gateway", {})}["command"]

    assert any(word.startswith("--http-tls-cert=") for word in gateway) == tls
    assert (job.get("scheme", "http") == "https") == tls
    assert ("authorization" in job and "tls_config" in job) == tls
    assert command[1:] == services()["prometheus"]["command"][1:]
    (address,) = job["static_configs"][0]["targets"]
    assert f"--http=0.0.0.0:{address.rpartition(':')[2]}" in gateway and address.partition(":")[0] == "gateway"


def test_the_images_can_send_traces() -> None:
    (scheduler,) = re.findall(r"^FROM base AS scheduler-dependencies$(.*?)^FROM", DOCKERFILE, re.MULTILINE | re.DOTALL)

    assert set(re.findall(r"\*o\['(\w+)'\]", scheduler)) == {"gateway", "smg", "tracing"}
    for stage in ("executor-dependencies", "executor-gpu-dependencies"):
        assert f"FROM scheduler-dependencies AS {stage}" in DOCKERFILE


def test_every_file_that_is_mounted_is_there() -> None:
    mounts = [
        mount for service in services().values() for mount in service.get("volumes", ()) if mount.startswith("./")
    ]

    assert mounts
    for mount in mounts:
        assert (ROOT / mount.split(":")[0]).is_dir()


@pytest.mark.parametrize("profile", ["", "gpu", "observability", "smg"])
@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "docker-compose.tls.yml"]])
def test_docker_compose_takes_every_profile(profile: str, files: list[str]) -> None:
    compose = compose_command()
    if compose is None:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    flags = [flag for file in files for flag in ("-f", file)] + (["--profile", profile] if profile else [])
    done = subprocess.run(
        [*compose, *flags, "config", "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def compose_command() -> list[str] | None:
    """What is typed for Docker Compose here; None where it is not installed."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        if subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    return None


def test_the_scheduler_stops_before_its_executors() -> None:
    """Compose stops in the reverse of the order in which it starts, and a drain needs executors."""
    found = services()

    assert "executor" in found["scheduler"]["depends_on"]
    assert not any("scheduler" in found[name]["depends_on"] for name in ("executor", "executor-gpu"))


def test_a_gpu_executor_can_compile_its_kernels_and_load_them() -> None:
    """Triton wants a C compiler, and a folder that can be written to and run from; the container's own is read-only."""
    stages = re.split(r"^FROM (?=\S+ AS )", DOCKERFILE, flags=re.MULTILINE)
    (stage,) = [stage for stage in stages if stage.split()[2:3] == ["executor-gpu"]]
    (cache,) = re.findall(r"\bTRITON_CACHE_DIR=(\S+)$", stage, flags=re.MULTILINE)
    folders = {folder: options.split(",") for mount in services()["executor-gpu"]["tmpfs"]
               for folder, _, options in [mount.partition(":")]}  # fmt: skip

    assert re.search(r"apt-get install .*\bgcc libc6-dev\b", stage)
    assert "exec" in folders[str(Path(cache).parent)], "Docker mounts a tmpfs with noexec"


def test_an_image_without_kernels_is_not_made() -> None:
    """Where they do not compile, torch stands in, and says so. Nobody reads what the making of an image says."""
    assert "RUN python -m executor.native.build && ls executor/native/built/*.so" in DOCKERFILE
