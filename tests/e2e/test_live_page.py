"""The live page in a real browser: what it shows moves, it can be used by keyboard, and it fits a telephone."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.e2e import browser
from tests.e2e.browser import Browser
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway

BINARY = browser.find()
pytestmark = pytest.mark.skipif(
    BINARY is None,
    reason="no Chromium here: apt-get install --no-install-recommends chromium, or name one in $CHROMIUM",
)
SEEN = "document.querySelector('#link').textContent.startsWith('live')"


@pytest.fixture(scope="module")
def gateway(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(server.address, tmp_path_factory.mktemp("gateway") / "log", f"--http-admin={server.admin}") as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert BINARY is not None
    with Browser(BINARY, tmp_path_factory.mktemp("profile")) as running:
        yield running


def test_the_page_shows_the_executor_and_asks_nobody_but_its_gateway(chromium: Browser, gateway: Gateway) -> None:
    page = chromium.page()
    page.open(f"http://{gateway.http}/")
    page.until(SEEN)

    assert page.ask("document.querySelector('#executors h2').textContent") == "executor-0"
    assert page.ask("document.querySelector('#model').textContent") == "tiny"
    assert page.ask("document.querySelector('.map').getAttribute('aria-label')").startswith("Map of ")
    drawn = "[...document.querySelector('.map').getContext('2d').getImageData(0, 0, 40, 40).data].some(v => v)"
    assert page.ask(drawn)
    assert page.requested == {f"http://{gateway.http}"}
    assert page.complaints == []


def test_a_chat_by_keyboard_shows_how_sure_each_token_was_and_what_the_cache_had(
    chromium: Browser, gateway: Gateway
) -> None:
    page = chromium.page()
    page.open(f"http://{gateway.http}/")
    page.until(SEEN)
    page.ask("document.querySelector('#max-tokens').value = 24; document.querySelector('.skip').focus()")
    page.press("Enter")  # to the playground
    page.ask("document.querySelector('#message').focus()")
    for number in (1, 2):
        page.type("Tell me of the sea, and of the ships that went out there long ago.")
        page.press("Enter")
        page.until(f"document.querySelectorAll('.cost br').length === {number}")

    told = page.ask("[...document.querySelectorAll('.cost')].map(each => each.textContent)")
    assert told[0].startswith("24 tokens, first after ")
    found = re.search(r"(\d+) of \d+ prompt tokens from the cache", told[1])
    assert found is not None and int(found[1]) > 0

    tokens = page.ask("document.querySelectorAll('.answer')[1].querySelectorAll('span').length")
    assert 1 < tokens <= 24
    page.ask("document.querySelectorAll('.answer')[1].focus()")
    page.press("Home")
    page.press("ArrowRight")
    assert page.ask("[...document.querySelectorAll('.answer')[1].children].findIndex(t => t.matches('.chosen'))") == 1
    assert page.ask("document.querySelectorAll('#detail li').length") >= 4
    assert page.ask("document.querySelectorAll('#detail li.is-it .percent').length") == 1
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_telephone_by_day_and_night(scheme: str, chromium: Browser, gateway: Gateway) -> None:
    page = chromium.page(width=375, height=800, scheme=scheme)
    page.open(f"http://{gateway.http}/")
    page.until(SEEN)

    assert page.ask("document.documentElement.scrollWidth") == 375
    red = int(page.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
    assert red > 200 if scheme == "light" else red < 50


def test_where_the_scheduler_is_not_asked_the_page_names_the_flag_and_still_talks(
    chromium: Browser, server: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Gateway(server.address, tmp_path_factory.mktemp("blind") / "log", "--http-admin=none") as blind:
        page = chromium.page()
        page.open(f"http://{blind.http}/")
        page.until("!document.querySelector('#notice').hidden")

        assert "--http-admin unix:PATH" in page.ask("document.querySelector('#notice').textContent")
        page.ask("document.querySelector('#message').focus()")
        page.type("hi")
        page.press("Enter")
        page.until("document.querySelectorAll('.cost br').length === 1")
