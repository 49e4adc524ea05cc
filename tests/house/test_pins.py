"""Two machines set up from the same commit run the same versions."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def pins() -> dict[str, str]:
    """Version of each package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin[1]): pin[2] for pin in found if pin is not None}


def requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What the installed package asks for on this platform."""
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras | {""}):
            yield requirement


def test_every_line_of_the_constraints_is_an_exact_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()

    assert len(pins()) == sum(not line.startswith("#") for line in lines)


def test_whatever_is_installed_is_pinned_also_what_the_dependencies_bring() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(text) for text in chain(project["dependencies"], *extras.values())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while asked:
        requirement = asked.pop()
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name != "pagewire" and (name, wanted) not in seen:
            seen.add((name, wanted))
            asked += requirements(name, wanted)

    # a local version says which build of the same version it is: torch's is +cpu or +cu...
    installed = {name: metadata.version(name).partition("+")[0] for name, _ in seen}
    wrong = sorted(f"{name}=={version}" for name, version in installed.items() if pins().get(name) != version)
    assert not wrong, problem(wrong)


def problem(wrong: list[str]) -> str:
    """What is to be done about packages that constraints.txt does not pin at that version."""
    if any(name.startswith(("nvidia", "cuda")) for name in wrong):
        return (
            f"torch here is the build for CUDA, whose {len(wrong)} packages constraints.txt does not pin; "
            "for the other one: rm -rf .venv; make setup, with PyTorch's index within reach or TORCH_INDEX=URL"
        )
    return f"constraints.txt does not pin {', '.join(wrong)}: name each there, or rm -rf .venv; make setup"


def test_what_is_wrong_is_told_in_one_line() -> None:
    cuda = problem(["nvidia-cublas==13.1.0.3", "triton==3.7.1"])

    assert "the build for CUDA" in cuda and "make setup" in cuda and "\n" not in cuda
    assert problem(["left-pad==1.3"]).startswith("constraints.txt does not pin left-pad==1.3:")
