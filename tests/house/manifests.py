"""The manifests for Kubernetes, as their tests read them: documents, the pods in them, and what these type."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from services.__main__ import _parser

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
OVERLAYS = (
    "base", "loopback", "overlays/autoscaled", "overlays/gpu", "overlays/inference-pool", "overlays/two-schedulers",
)  # fmt: skip
"""What is meant to be applied: `kubectl apply -k`."""

Document = Mapping[str, Any]
Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    """What a controller makes."""

    kind: str
    name: str
    labels: Labels
    spec: Mapping[str, Any]

    @property
    def containers(self) -> Sequence[Mapping[str, Any]]:
        """Those that stay."""
        found: Sequence[Mapping[str, Any]] = self.spec["containers"]
        return found

    @property
    def all_containers(self) -> Sequence[Mapping[str, Any]]:
        """Those that run before them, too."""
        return [*self.spec.get("initContainers", ()), *self.containers]

    @property
    def ports(self) -> Mapping[str, int]:
        """All that is opened, by name."""
        return {port["name"]: port["containerPort"] for each in self.containers for port in each.get("ports", ())}


def kustomizations() -> list[Path]:
    """Every folder that says what belongs together."""
    return sorted(path.parent for path in FOLDER.rglob("kustomization.yaml"))


def plain(*folders: str) -> list[Document]:
    """The documents in these folders' files, read as they are: no patch, no prefix."""
    return [
        document
        for folder in folders
        for path in sorted((FOLDER / folder).glob("*.yaml"))
        if path.name != "kustomization.yaml"
        for document in yaml.safe_load_all(path.read_text())
    ]


def rendered(overlay: str) -> list[Document] | None:
    """What `kubectl apply -k` would send; None where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return None
    done = subprocess.run([kubectl, "kustomize", FOLDER / overlay], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def containers_added(component: str) -> list[Mapping[str, Any]]:
    """The containers that a component puts beside those that are there, as its patches have them."""
    said = yaml.safe_load((FOLDER / "components" / component / "kustomization.yaml").read_text())
    operations = [operation for patch in said["patches"] for operation in yaml.safe_load(patch["patch"])]
    return [each["value"] for each in operations if each["path"] == "/spec/template/spec/containers/-"]


def images(folder: Path) -> tuple[set[str], set[str]]:
    """What a kustomization makes pods of: the images that something in it tags, and those that nothing does."""
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    tagged: set[str] = set()
    bare: set[str] = set()
    for name in [*said.get("resources", ()), *(patch["path"] for patch in said.get("patches", ()) if "path" in patch)]:
        path = (folder / name).resolve()
        if path.is_dir():
            inner_tagged, inner_bare = images(path)
            tagged |= inner_tagged
            bare |= inner_bare
        else:
            bare |= set(re.findall(r"^\s*(?:- )?image: (\S+)$", path.read_text(), flags=re.MULTILINE))
    files = [folder, *(folder / component for component in said.get("components", ()))]
    named = {each["name"] for file in files for each in tags(file)}
    return tagged | (bare & named), bare - named


def tags(folder: Path) -> list[Document]:
    """The images whose registry and tag this folder's kustomization says."""
    found: list[Document] = yaml.safe_load((folder / "kustomization.yaml").read_text()).get("images", [])
    return found


def pods(documents: Sequence[Document]) -> list[Pods]:
    """What the controllers among them make."""
    return [
        Pods(
            kind=document["kind"],
            name=document["metadata"]["name"],
            labels=document["spec"]["template"]["metadata"]["labels"],
            spec=document["spec"]["template"]["spec"],
        )
        for document in documents
        if document["kind"] in ("Deployment", "StatefulSet", "Job")
    ]


def selected(labels: Labels, among: Sequence[Pods]) -> list[Pods]:
    """Those that have all of these labels."""
    return [each for each in among if labels.items() <= each.labels.items()]


def typed(container: Mapping[str, Any]) -> Iterator[list[str]]:
    """Every command line of `pagewire` in a container: what it runs, and what its probes do."""
    if "args" in container:
        yield container["args"]  # the image's entry point is `pagewire`
    commands = [container.get("command", [])]
    commands += [container[name].get("exec", {}).get("command", []) for name in container if name.endswith("Probe")]
    for command in commands:
        if command[:1] == ["pagewire"]:
            yield command[1:]
        if command[:2] == ["sh", "-c"]:
            for inner in re.findall(r"\bpagewire ([^;&|]+)", command[2]):
                yield shlex.split(inner)


_pagewire = cache(_parser)


def parsed(command: Sequence[str]) -> argparse.Namespace:
    """A command line as `pagewire` takes it. What it would refuse ends the test."""
    try:
        return _pagewire().parse_args(list(command))
    except SystemExit:
        raise AssertionError(f"pagewire refuses {shlex.join(command)}") from None
