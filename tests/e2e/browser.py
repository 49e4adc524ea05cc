"""A real Chromium without a window, driven by its DevTools protocol over a pipe: no library, no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_S = 180.0

# Chromium reads descriptor 3 and writes 4.
LAUNCH = """
import os, sys
read, write = (os.dup(os.dup(int(number))) for number in sys.argv[1:3])  # so neither is the other's place
for number, at in ((read, 3), (write, 4)):
    os.dup2(number, at), os.set_inheritable(at, True)  # it may be there already
os.execv(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    """The browser of this machine, or the one that $CHROMIUM names."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One process; ended with the block."""

    def __init__(self, binary: str, profile: Path) -> None:
        theirs_read, self._write = os.pipe()
        self._read, theirs_write = os.pipe()
        self._popen = subprocess.Popen(
            [
                *(sys.executable, "-c", LAUNCH, str(theirs_read), str(theirs_write), binary),
                "--headless=new",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "--no-sandbox",  # in a container as root there is none; it opens our own page only
                *("--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            ],
            pass_fds=(theirs_read, theirs_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_read)
        os.close(theirs_write)
        self._unread = b""
        self._next_id = 0
        self.events: list[Mapping[str, Any]] = []

    def call(self, method: str, session: str = "", **params: Any) -> Any:
        """Ask the browser, and hear its answer. Events that come before it are kept."""
        self._next_id += 1
        asked = {"id": self._next_id, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._message(f"{method} {params}")
            if told.get("id") == self._next_id:
                assert "error" not in told, f"{method}: {told}"
                return told["result"]
            self.events.append(told)

    def page(self, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
        """A new tab of that size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        return page

    def close(self) -> None:
        """End it."""
        self._popen.kill()
        self._popen.wait()
        os.close(self._write)
        os.close(self._read)

    def _message(self, what: str) -> Any:
        until = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._unread:
            readable, _, _ = select.select([self._read], [], [], max(0, until - time.monotonic()))
            chunk = os.read(self._read, 1 << 16) if readable else b""
            assert chunk, f"no answer to {what}; exit code {self._popen.poll()}"
            self._unread += chunk
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **params: Any) -> Any:
        """Ask the browser about this tab."""
        return self._browser.call(method, self._session, **params)

    def resize(self, width: int, height: int) -> None:
        """The size of what is seen, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, url: str) -> None:
        """Go there, and wait until the page has been read."""
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def ask(self, expression: str) -> Any:
        """What the expression comes to in the page; a promise is awaited."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until that holds in the page, which may be replaced meanwhile."""
        until = time.monotonic() + TIMEOUT_S
        wait = (
            f"new Promise(done => {{ const look = () => ({condition}) ? done(true) : setTimeout(look, 20); look(); }})"
        )
        while True:
            try:
                told = self.call("Runtime.evaluate", expression=wait, awaitPromise=True, returnByValue=True)
            except AssertionError:  # the page that was asked is gone
                assert time.monotonic() < until, f"never: {condition}"
                continue
            assert "exceptionDetails" not in told, told["exceptionDetails"]
            return

    def press(self, key: str) -> None:
        """A key that is no letter: Tab, Enter, ArrowRight."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "End": 35, "Home": 36}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                **(text if kind == "keyDown" else {}),
            )

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of what is seen, or of the whole page."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(told["data"])

    @property
    def complaints(self) -> list[str]:
        """Errors of scripts, and what a policy kept from happening."""
        self.ask("1")  # what was said until now has been heard behind this
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
        return found

    @property
    def requested(self) -> set[str]:
        """Where the page has asked: scheme and address."""
        urls = [
            str(event["params"]["request"]["url"])
            for event in self._browser.events
            if event.get("sessionId") == self._session and event["method"] == "Network.requestWillBeSent"
        ]
        return {"/".join(url.split("/")[:3]) for url in urls if not url.startswith(("data:", "about:"))}
