"""Takes docs/live-view.png: the default model under the work of three tenants, and two messages in the playground.

`python -m tests.e2e.live_picture docs/live-view.png`, with Chromium, on a machine that does nothing else: the figures
in it are those of the moment.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc

from common.config import DEFAULT_MODEL
from pagewire import Client
from services.api_keys import line_of, new_key
from services.model_store import pull
from tests.e2e import browser
from tests.e2e.browser import Browser, Page
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway

TENANTS = {"alice": 4, "bob": 3, "carol": 2}
"""How many requests each has open at once."""

RULES = "You answer briefly, in plain words, and say so where you do not know. " * 4
TOPICS = ("tides", "bread", "comets", "bridges", "moss", "violins", "glaciers", "lighthouses", "paper", "clouds")
WARM_S = 45.0  # so the curves, which show a minute, are full
TOKEN = 6  # of the second answer, whose alternatives are shown


def work(address: str, key: str, seed: int, over: threading.Event) -> None:
    """Ask one thing after another until it is over; the servers may be gone by then."""
    dice = random.Random(seed)
    with Client(address, api_key=key) as client, contextlib.suppress(grpc.RpcError):
        for count in itertools.count():
            asked = f"Tell me of {dice.choice(TOPICS)}. " + f"This is question {count}. " * dice.randrange(12)
            messages = [{"role": "system", "content": RULES}, {"role": "user", "content": asked}]
            for _ in client.stream(messages=messages, max_tokens=dice.choice([40, 90, 160]), ignore_eos=True):
                if over.is_set():
                    return


def enter(page: Page, field: str, words: str) -> None:
    """Fill in a field of the page, and leave it."""
    page.ask(
        f"{{ const at = document.querySelector('#{field}'); at.value = {words!r}; "
        "at.dispatchEvent(new Event('change')); }"
    )


def talk(page: Page, key: str) -> None:
    """Two messages, and a look at a token of the second answer."""
    enter(page, "api-key", key)
    enter(page, "max-tokens", "40")
    for number, words in enumerate(
        ("What is the capital of France, and what is it known for?", "Which river runs through it?")
    ):
        page.ask("document.querySelector('#message').focus()")
        page.type(words)
        page.press("Enter")
        page.until(f"document.querySelectorAll('.cost br').length === {number + 1}")
    page.ask("document.querySelectorAll('.answer')[1].focus()")
    page.press("Home")
    for _ in range(TOKEN):
        page.press("ArrowRight")


def take(out: Path, folder: Path, binary: str) -> None:
    """The picture, of processes that run for it alone."""
    keys = {name: new_key() for name in (*TENANTS, "reader")}
    (folder / "keys").write_text("".join(f"{line_of(name, key)}\n" for name, key in keys.items()))
    (folder / "live-key").write_text("p" * 32)
    over = threading.Event()
    cluster = Cluster(pull(DEFAULT_MODEL, lambda what, done, total: None), folder, flags=[f"--api-keys={folder}/keys"])
    try:
        cluster.start_executor("--num-blocks=300", fake=False)
        flags = (f"--http-admin={cluster.admin}", f"--live-view={folder}/live-key")
        users = [name for name, count in TENANTS.items() for _ in range(count)]
        threads = [
            threading.Thread(target=work, args=(cluster.address, keys[name], seed, over))
            for seed, name in enumerate(users)
        ]
        with Gateway(cluster.address, folder / "gateway.log", *flags) as gateway, Browser(binary, folder) as chromium:
            page = chromium.page(width=1280, height=1040)
            page.open(f"http://{gateway.http}/")
            enter(page, "live-key", "p" * 32)
            page.until("document.querySelector('#link').textContent.startsWith('live')")
            for thread in threads:
                thread.start()
            time.sleep(WARM_S)
            talk(page, keys["reader"])
            page.until("Number(document.querySelector('#waiting').textContent) > 0")
            out.write_bytes(page.screenshot())
            over.set()
            for thread in threads:
                thread.join()
    finally:
        over.set()
        cluster.close()


def main() -> int:
    """1 where there is no browser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    binary = browser.find()
    if binary is None:
        print("no Chromium here: apt-get install --no-install-recommends chromium, or name one in $CHROMIUM")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        take(asked.out, Path(folder), binary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
