"""Kubernetes' own schemas take every manifest, and no field in them is one that Kubernetes does not know."""

from __future__ import annotations

# ruff: noqa: E402 - what follows the skip
from tests.clients.needed import needs

needs("kubernetes_validate")

from importlib import import_module
from typing import Any

import pytest

from tests.house.manifests import OVERLAYS, Document, plain, rendered

kubernetes_validate: Any = import_module("kubernetes_validate")  # .venv has it not, and the type checkers see .venv

VERSIONS = ("1.32", "1.34")


def check(documents: list[Document], version: str) -> int:
    """Hold each against its schema; how many had one. Those of others' (KEDA) have none here."""
    known = [document for document in documents if document["apiVersion"] != "keda.sh/v1alpha1"]
    for document in known:
        kubernetes_validate.validate(document, version, strict=True)
    return len(known)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_file_is_as_the_schemas_say(version: str) -> None:
    components = ("components/autoscaling", "components/inference-pool", "components/tracing")
    assert check(plain("cell", "base", "loopback", *components), version) >= 20


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_so_is_what_an_overlay_makes_of_them(overlay: str) -> None:
    documents = rendered(overlay)
    if documents is None:
        pytest.skip("kubectl is not installed: overlays are looked at where it is")

    assert check(documents, VERSIONS[-1])


def test_a_field_that_nobody_knows_would_be_found() -> None:
    (first, *_) = plain("cell")
    with pytest.raises(kubernetes_validate.ValidationError):
        check([{**first, "spec": {**first["spec"], "replica": 1}}], VERSIONS[-1])
