"""What the pages tell a reader to type works, as it stands there, against a live server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from common.config import ClientConfig, ExecutorConfig, GatewayConfig, LogConfig, SchedulerConfig
from pagewire import Client
from services.admission import Refusal
from tests.e2e.cluster import ROOT, Cluster
from tests.e2e.fenced import Reader, blocks
from tests.e2e.gateways import Gateway

PAGES = ("README.md", "docs/api.md", "docs/operating.md")
QUESTION = {"role": "user", "content": "Is it raining?"}


@pytest.fixture(scope="module")
def gateway(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """OpenAI's API in front of the shared server."""
    log = tmp_path_factory.mktemp("gateway") / "log"
    with Gateway(server.address, log, f"--http-admin={server.admin}") as running:
        yield running


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs_as_it_stands(page: str, server: Cluster, gateway: Gateway, tmp_path: Path) -> None:
    addresses = {
        "10.0.0.1:50051,10.0.0.2:50051": server.address,
        "pagewire status 127.0.0.1:50051": f"pagewire status {server.admin}",  # it has no usual place in a test
        "127.0.0.1:50051": server.address,
        "127.0.0.1:8000": gateway.http,
    }
    reader = Reader(tmp_path, addresses)
    run = [block for block in blocks(ROOT / page) if not block.skip]

    assert len(run) >= 5
    with Client(server.address) as client:
        for block in run:
            if page == "README.md":  # read in pieces: what a piece leaves to its reader is there
                reader.names = {"client": client, "LONG": "Be brief. " * 4, "question": QUESTION}
            reader.run(block, ROOT / page)


def test_who_is_told_of_a_limit_finds_it_in_the_operators_page() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    table = page.split("| limit of a refusal |")[1].split("\n\n")[0]

    assert {
        name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    } == {*get_args(Refusal)}


def test_every_link_of_a_page_leads_somewhere() -> None:
    for page in PAGES[1:]:
        path = ROOT / page
        text = path.read_text()
        for file, anchor in re.findall(r"\]\(([^)#:]*)#?([\w-]*)\)", text):
            target = path.parent / file if file else path
            assert target.exists(), f"{page}: {file}"
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{page}: {file}#{anchor}"


def test_every_flag_that_a_page_names_exists() -> None:
    configs = (SchedulerConfig, ExecutorConfig, ClientConfig, GatewayConfig, LogConfig)
    settings = {field.name for config in configs for field in fields(config)}
    for page in PAGES[1:]:
        prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        flags = set(re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?![\w-]*…)", prose)) - {"profile", "fail", "silent"}
        assert {flag.replace("-", "_") for flag in flags} <= settings, page
