"""The manifests fit together, fit our command line, and give away nothing that they need not.

As their files stand, and, where kubectl is, as each overlay is rendered. tests/clients/test_kubernetes_schemas.py holds
them against Kubernetes' own schemas.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import yaml

from common.config import ExecutorConfig, GatewayConfig, SchedulerConfig
from services.flags import from_flags
from services.health import LIVENESS
from services.lifecycle import check_bind, check_binds, is_local, split_address
from tests.house.manifests import (
    FOLDER,
    OVERLAYS,
    Document,
    Labels,
    Pods,
    containers_added,
    images,
    kustomizations,
    parsed,
    plain,
    pods,
    rendered,
    selected,
    tags,
    typed,
)
from tests.house.observed import OBSERVABILITY, alerts

PORT_OF_A_POOL = 8000  # unless its chart is told another one
LAST_WORDS_S = 10  # after the drain: ends of calls, the step that runs


def _sets() -> Iterator[Any]:
    components = ("components/autoscaling", "components/inference-pool", "components/tracing")
    yield pytest.param(lambda: plain("cell", "base", *components), id="as it stands")
    yield pytest.param(lambda: plain("loopback"), id="loopback as it stands")
    for overlay in OVERLAYS:
        yield pytest.param(lambda overlay=overlay: rendered(overlay), id=overlay)


@pytest.fixture(scope="module", params=_sets())
def documents(request: pytest.FixtureRequest) -> list[Document]:
    """What may be applied together."""
    found: list[Document] | None = request.param()
    if found is None:
        pytest.skip("kubectl is not installed: overlays are looked at where it is")
    return found


@pytest.fixture(scope="module")
def made(documents: list[Document]) -> list[Pods]:
    """The pods that come of them."""
    return pods(documents)


def labels_in(source: Document) -> list[Labels]:
    """What a rule of a NetworkPolicy asks of whoever comes."""
    return [selector["matchLabels"] for selector in source.values()]


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def test_every_file_is_named_where_it_belongs() -> None:
    for folder in kustomizations():
        said = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named = {*said.get("resources", ()), *(patch["path"] for patch in said.get("patches", ()) if "path" in patch)}

        assert {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"} == {
            name for name in named if name.endswith(".yaml")
        }
        assert all((folder / name).exists() for name in {*named, *said.get("components", ())}), folder


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whoever_tags_an_image_tags_it_in_every_pod(overlay: str) -> None:
    tagged, bare = images(FOLDER / overlay)

    assert tagged and not bare
    for each in pods(rendered(overlay) or []):
        for container in each.all_containers:
            assert container["image"].partition(":")[0] in tagged and container["image"].endswith(":latest")


def test_where_the_registry_is_is_said_once() -> None:
    saying = [folder for folder in kustomizations() if any(tag["name"] == "pagewire-scheduler" for tag in tags(folder))]

    assert saying == [FOLDER / "components" / "images"]


def test_every_command_line_is_one_that_pagewire_takes(made: list[Pods]) -> None:
    commands = [command for each in made for container in each.all_containers for command in typed(container)]

    assert len(commands) >= len(made)
    for command in commands:
        parsed(command)


def test_every_variable_is_one_that_pagewire_knows(made: list[Pods]) -> None:
    settings = {
        f"PAGEWIRE_{field.name.upper()}"
        for config in (SchedulerConfig, ExecutorConfig, GatewayConfig)
        for field in fields(config)
    }
    for each in made:
        for container in each.all_containers:
            given = {variable["name"] for variable in container.get("env", ())}
            asked = set(re.findall(r"\$\((\w+)\)", " ".join(container.get("args", ()))))
            assert asked <= given
            assert {name for name in given if name.startswith("PAGEWIRE_")} <= settings | {"PAGEWIRE_HOME"}
        assert each.spec["enableServiceLinks"] is False, "PAGEWIRE_LINK_PORT=tcp://… would be for a flag of ours"


def test_what_other_machines_can_reach_has_tls_and_keys(made: list[Pods]) -> None:
    for command in (container["args"] for each in made for container in each.containers):
        given = parsed(command)
        if command[0] in ("scheduler", "serve"):
            check_binds(from_flags(SchedulerConfig, given))
        if command[0] in ("gateway", "serve") and not getattr(given, "insecure", False):
            check_bind(given.http, insecure=False, missing=[] if given.http_tls_cert and given.http_tls_key else ["x"])
        if command[0] == "gateway":
            assert given.tls_ca or all(map(is_local, given.address.split(",")))
        if command[0] == "executor":
            assert given.link_tls_ca and given.link_tls_cert and given.link_tls_key


def test_only_a_pools_gateway_speaks_in_the_clear_and_to_nobody_who_is_not_named(
    documents: list[Document], made: list[Pods]
) -> None:
    for each in made:
        for container in each.containers:
            if not getattr(parsed(container["args"]), "insecure", False):
                continue
            assert container["args"][0] == "gateway" and each.labels["pagewire/pool"] == "cells"
            own = [
                policy["spec"]
                for policy in of_kind(documents, "NetworkPolicy")
                if selected(policy["spec"]["podSelector"]["matchLabels"], [each])
            ]
            rules = [rule for policy in own for rule in policy.get("ingress", ())]
            (port,) = (port["name"] for port in container["ports"])
            allowed = [rule for rule in rules if port in {each["port"] for each in rule["ports"]}]
            assert allowed and all(all(labels_in(source) for source in rule["from"]) for rule in allowed)


def test_no_secret_stands_in_any_file() -> None:
    for path in FOLDER.rglob("*.yaml"):
        text = path.read_text()
        assert "BEGIN" not in text and "pw-" not in text, path
        for document in yaml.safe_load_all(text):
            assert document["kind"] not in ("Secret", "ConfigMap"), path
            assert "secretGenerator" not in document, path


def test_every_container_gives_up_its_privileges(made: list[Pods]) -> None:
    for each in made:
        security = each.spec["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] == security["runAsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert each.spec["automountServiceAccountToken"] is False
        for container in each.all_containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def test_whatever_is_named_in_a_command_is_mounted(made: list[Pods]) -> None:
    for each in made:
        volumes = {volume["name"] for volume in each.spec["volumes"]}
        mounted = {mount["name"] for container in each.all_containers for mount in container["volumeMounts"]}
        assert volumes == mounted, f"{each.name}: every volume is mounted somewhere, and every mount is a volume's"
        for container in each.all_containers:
            folders = tuple(mount["mountPath"] + "/" for mount in container["volumeMounts"])
            said = [variable["value"] for variable in container.get("env", ()) if "value" in variable]
            said += [word for command in typed(container) for word in command]
            paths = [found for word in said if (found := re.search(r"(?<![\w/])/[\w./-]+", word))]
            for path in (found[0] for found in paths):
                assert f"{path}/".startswith(folders), f"{each.name}/{container['name']}: {path}"


def test_every_probe_asks_at_a_port_that_is_open_for_what_is_served_there(made: list[Pods]) -> None:
    for each in made:
        for container in each.containers:
            given = parsed(container["args"])
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                probe = container.get(name, {})
                if "grpc" in probe:
                    assert probe["grpc"]["port"] == split_address(given.health_listen)[1]
                    assert probe["grpc"]["port"] in ports.values()
                    assert probe["grpc"].get("service", "") in ("", LIVENESS)
                if "httpGet" in probe:
                    assert ports[probe["httpGet"]["port"]] == split_address(given.http)[1]
                    assert probe["httpGet"]["path"] in ("/live", "/ready")
                    assert probe["httpGet"]["scheme"] == ("HTTPS" if given.http_tls_cert else "HTTP")
                if probe.get("exec", {}).get("command", [""])[0] == "test":
                    assert probe["exec"]["command"] == ["test", "-e", given.ready_file]


def test_what_is_not_ready_is_replaced_by_a_manifest_that_is_right(documents: list[Document]) -> None:
    for document in of_kind(documents, "StatefulSet"):  # which waits for each pod's readiness, unless it is told not to
        assert document["spec"]["podManagementPolicy"] == "Parallel"
    for document in of_kind(documents, "Job"):  # whose template cannot be changed
        assert document["spec"]["ttlSecondsAfterFinished"] <= 600


def test_no_news_of_the_load_is_not_taken_for_no_load(documents: list[Document]) -> None:
    triggers = [each for scaled in of_kind(documents, "ScaledObject") for each in scaled["spec"]["triggers"]]

    assert all(each["metadata"]["ignoreNullValues"] == "false" for each in triggers if each["type"] == "prometheus")


def test_whoever_waits_for_others_is_not_started_anew_for_that(made: list[Pods]) -> None:
    for each in made:
        for container in each.containers:
            for name in ("startupProbe", "livenessProbe"):
                probe = container.get(name, {})
                assert probe.get("grpc", {}).get("service", LIVENESS) == LIVENESS
                assert probe.get("httpGet", {}).get("path", "/live") == "/live"


def test_every_port_that_is_listened_on_is_declared_and_no_other(made: list[Pods]) -> None:
    for each in made:
        for container in each.containers:
            given = vars(parsed(container["args"]))
            opened = [given.get(name, "") for name in ("listen", "link_listen", "health_listen", "http")]
            reachable = {split_address(address)[1] for address in opened if address and not is_local(address)}
            assert reachable == {port["containerPort"] for port in container.get("ports", ())}


def test_a_pod_is_killed_only_after_its_drain(made: list[Pods]) -> None:
    for each in made:
        for container in each.containers:
            given = parsed(container["args"])
            before = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
            drains_s = [getattr(given, name, 0.0) for name in ("drain_s", "http_drain_s")]
            # `serve` stops one after the other: gateway, scheduler, executors
            drain_s = sum(drains_s) + ExecutorConfig().drain_s if container["args"][0] == "serve" else max(drains_s)

            assert before[0] == "sleep"
            grace_s = each.spec.get("terminationGracePeriodSeconds", 30)
            assert grace_s >= float(before[1]) + drain_s + LAST_WORDS_S or each.kind == "Job"
            assert each.spec["shareProcessNamespace"], "as process 1 it would not hear SIGTERM before it listens for it"


def test_every_selector_finds_what_it_is_for(documents: list[Document], made: list[Pods]) -> None:
    for document in documents:
        if document["kind"] in ("Deployment", "StatefulSet"):
            found = selected(document["spec"]["selector"]["matchLabels"], made)
            assert [each.name for each in found] == [document["metadata"]["name"]]
    for service in of_kind(documents, "Service"):
        (found_pods,) = selected(service["spec"]["selector"], made)
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(found_pods.ports)
        for port in service["spec"]["ports"]:
            assert port["port"] in (found_pods.ports[port["targetPort"]], 443)
    services = {service["metadata"]["name"] for service in of_kind(documents, "Service")}
    assert {each["spec"]["serviceName"] for each in of_kind(documents, "StatefulSet")} <= services
    for budget in of_kind(documents, "PodDisruptionBudget"):
        assert selected(budget["spec"]["selector"]["matchLabels"], made)
        assert budget["spec"]["maxUnavailable"] == 1, "a node can be emptied"


def test_whoever_is_dialled_is_there_under_that_name(documents: list[Document], made: list[Pods]) -> None:
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind(documents, "Service")}
    dialled: set[str] = set()
    for command in (container["args"] for each in made for container in each.containers):
        given = parsed(command)
        if command[0] in ("gateway", "executor"):
            address = given.address if command[0] == "gateway" else given.scheduler
            dialled |= {part for part in address.split(",") if not is_local(part)}
    for host, port in map(split_address, dialled):
        assert port in {each["port"] for each in services[host]["ports"]}
    for name, service in services.items():
        if any(port["name"] == "link" for port in service["ports"]):
            assert service["publishNotReadyAddresses"], f"{name}: a scheduler is ready once an executor has joined"
            assert any(host == name for host, _ in map(split_address, dialled)), f"{name}: this cell has executors"


def test_the_link_port_is_for_executors_alone_and_nobody_dials_these(
    documents: list[Document], made: list[Pods]
) -> None:
    policies = of_kind(documents, "NetworkPolicy")
    if not policies:
        assert not any(each.ports for each in made), "nothing can be reached from outside of its pod"
        return
    for each in made:
        own = [policy["spec"] for policy in policies if selected(policy["spec"]["podSelector"]["matchLabels"], [each])]
        assert {"Ingress", "Egress"} <= {kind for policy in own for kind in policy["policyTypes"]}
        allowed = [rule for policy in own for rule in policy.get("ingress", ())]
        assert {port["port"] for rule in allowed for port in rule["ports"]} <= set(each.ports)
        for rule in allowed:
            if "link" in {port["port"] for port in rule["ports"]}:
                (source,) = rule["from"]
                (found,) = {
                    dialler.labels["app.kubernetes.io/component"]
                    for dialler in selected(source["podSelector"]["matchLabels"], made)
                }
                assert found == "executor"
        if each.labels["app.kubernetes.io/component"] == "executor":
            assert not allowed and not each.ports


def test_a_name_may_be_asked_of_a_cache_that_has_no_namespace(documents: list[Document], made: list[Pods]) -> None:
    for policy in of_kind(documents, "NetworkPolicy"):
        if policy["metadata"]["name"] == "pagewire-names":
            anywhere = [port for rule in policy["spec"]["egress"] if "to" not in rule for port in rule["ports"]]
            assert anywhere == [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]
            assert selected(policy["spec"]["podSelector"]["matchLabels"], made) == made


def test_traces_get_out_where_they_are_sent() -> None:
    (policy,) = plain("components/tracing")
    said = yaml.safe_load((FOLDER / "components" / "tracing" / "kustomization.yaml").read_text())
    ((added,),) = (yaml.safe_load(patch["patch"]) for patch in said["patches"])
    made = [
        each for each in pods(plain("cell", "base")) if re.fullmatch(said["patches"][0]["target"]["kind"], each.kind)
    ]

    assert {each.kind for each in made} == {"Deployment", "StatefulSet"}
    for each in made:
        endpoint = parsed([*each.containers[0]["args"], added["value"]]).otlp_endpoint
        host, port = split_address(endpoint.rpartition("/")[2])
        (rule,) = policy["spec"]["egress"]
        assert rule["ports"] == [{"protocol": "TCP", "port": port}]
        assert host.split(".")[1] in rule["to"][0]["namespaceSelector"]["matchLabels"].values()
        assert selected(policy["spec"]["podSelector"]["matchLabels"], [each])


def test_prometheus_reads_whoever_tells_metrics_as_it_must_be_asked() -> None:
    documents = plain("cell", "base")
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind(documents, "Service")}
    jobs = yaml.safe_load((OBSERVABILITY / "kubernetes.yml").read_text())["scrape_configs"]
    (watched,) = [re.findall(r'job=~"(.*)"', rule["expr"])[0] for rule in alerts() if "up{" in rule["expr"]]
    read: set[str] = set()
    for job in jobs:
        (asked,) = job["dns_sd_configs"]
        name, namespace, _ = asked["names"][0].split(".")
        (found,) = selected(services[name]["selector"], pods(documents))
        (gateway,) = [each for each in map(parsed, gateways_of(found)) if port_of(each) == asked["port"]]
        read.add(found.labels["app.kubernetes.io/component"])

        assert services[name]["clusterIP"] == "None", "each of the pods, and not one of them"
        assert services[name]["publishNotReadyAddresses"] and asked["type"] == "A"
        assert gateway.http_tls_cert and job["scheme"] == "https"
        assert job["tls_config"]["ca_file"] and job["tls_config"]["server_name"]
        assert job["authorization"]["credentials_file"], "which /metrics asks for where others can reach it"
        assert re.fullmatch(watched, job["job_name"])
        assert {"target_label": "namespace", "replacement": namespace} in job["relabel_configs"]
    assert read == {"scheduler", "gateway"}


def test_a_pool_asks_each_scheduler_what_it_does_at_the_port_that_it_sends_to() -> None:
    (added,) = containers_added("inference-pool")
    gateway = parsed(added["args"])
    (pod,) = [each for each in pods(plain("cell")) if each.kind == "StatefulSet"]
    scheduler = parsed(next(each["args"] for each in pod.containers if each["name"] == "scheduler"))

    assert gateway.address == scheduler.local_listen, "the scheduler of its own pod and no other"
    assert gateway.http_admin == scheduler.admin_listen, "which tells what /metrics has in vLLM's names"
    assert gateway.insecure and not gateway.http_tls_cert, "a picker shows no key, and a pool's ports have no TLS"
    assert scheduler.api_keys, "who asks for an answer has a key all the same"
    assert split_address(gateway.http)[1] == PORT_OF_A_POOL and "readinessProbe" in added


def test_the_pool_that_the_operators_page_makes_is_of_all_cells_and_its_picker_may_come() -> None:
    documents = rendered("overlays/inference-pool")
    if documents is None:
        pytest.skip("kubectl is not installed: overlays are looked at where it is")
    page = (FOLDER.parents[1] / "docs" / "operating.md").read_text()
    (release,) = re.findall(r"helm install (\S+) -n pagewire ", page)
    found = selected(dict(re.findall(r"inferencePool\.modelServers\.matchLabels\.(\S+)=(\S+)", page)), pods(documents))
    (labelled,) = re.findall(r"kubectl label namespace \S+ (\S+)=(\S+)", page)
    (policy,) = [each for each in of_kind(documents, "NetworkPolicy") if each["metadata"]["name"] == "pagewire-pool"]

    assert {each.name for each in found} == {"pagewire-scheduler", "pagewire-scheduler-b"}
    assert all(each.ports["http"] == PORT_OF_A_POOL for each in found)
    assert selected(policy["spec"]["podSelector"]["matchLabels"], pods(documents)) == found
    (rule,) = policy["spec"]["ingress"]
    assert [labels for source in rule["from"] for labels in labels_in(source)] == [
        {"inferencepool": f"{release}-epp"},  # as the chart calls them
        dict([labelled]),
    ]


def gateways_of(made: Pods) -> list[list[str]]:
    """What the gateways in a pod are started with."""
    return [container["args"] for container in made.containers if container["args"][0] == "gateway"]


def port_of(gateway: argparse.Namespace) -> int:
    """Where it tells /metrics."""
    return split_address(gateway.http)[1]


def test_the_operators_page_asks_a_scheduler_where_it_answers() -> None:
    page = (FOLDER.parents[1] / "docs" / "operating.md").read_text()
    (pod,) = [each for each in pods(plain("cell")) if each.kind == "StatefulSet"]
    given = parsed(next(each["args"] for each in pod.containers if each["name"] == "scheduler"))
    inside = re.findall(
        r"^(?:kubectl -n pagewire exec .* -- |in-scheduler )pagewire (\w+) (\S+)", page, flags=re.MULTILINE
    )

    assert {command for command, _ in inside} == {"health", "status"}
    for command, address in inside:
        if command == "health":
            assert split_address(address)[1] == split_address(given.health_listen)[1], "a port without TLS"
        else:
            assert address == given.admin_listen


def test_what_is_scaled_is_there_and_its_number_is_set_by_nobody_else(documents: list[Document]) -> None:
    scaled = [document for document in documents if "scaleTargetRef" in document.get("spec", {})]
    deployed = {document["metadata"]["name"]: document["spec"] for document in of_kind(documents, "Deployment")}

    assert {document["apiVersion"] for document in scaled} <= {"autoscaling/v2", "keda.sh/v1alpha1"}
    for document in scaled:
        assert document["spec"]["scaleTargetRef"]["name"] in deployed


def test_where_numbers_follow_the_load_nothing_sets_them_again() -> None:
    documents = rendered("overlays/autoscaled")
    if documents is None:
        pytest.skip("kubectl is not installed: overlays are looked at where it is")
    scaled = {
        document["spec"]["scaleTargetRef"]["name"]
        for document in documents
        if "scaleTargetRef" in document.get("spec", {})
    }

    assert scaled == {"pagewire-executor", "pagewire-gateway"}
    assert not any("replicas" in document["spec"] for document in of_kind(documents, "Deployment"))
