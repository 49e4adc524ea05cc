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
    assert installed.items() <= pins().items()
