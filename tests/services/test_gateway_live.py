"""The live view as the gateway serves it: to whom, with which names, and under which policy."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest

from common.errors import Overloaded, PagewireError, Unavailable
from protos import monitoring_pb2 as pb
from services.gateway.app import Gateway
from services.gateway.live import NO_STATE, NOT_SHOWN, PAGE, LiveAccess, LiveView, Watch, read_access
from tests.services.gateway_calls import Call, Scheduler, ask, gateway
from tests.services.served import HANG_S

KEY = "0123456789abcdef"
HERE = ((b"host", b"127.0.0.1:8000"),)


def picture() -> pb.WatchStateResponse:
    return pb.WatchStateResponse(
        executors=[
            pb.ExecutorState(
                status=pb.ExecutorStatus(name="e", num_blocks=3, num_running=2),
                cells=bytes([1, 0, 3]),
                blocks_per_cell=1,
                rows=[pb.RowState(request=5, tenant="alice"), pb.RowState(request=6, choice=2, tenant="bob")],
            )
        ],
        num_executors=1,
        waiting=[pb.WaitingState(tenant="bob", priority=1, num_sequences=2)],
        output_tokens_per_s=12.34,
    )


class Watched:
    """In place of a scheduler: two pictures, and then an error where one is to be."""

    def __init__(self, error: PagewireError | None = None, pictures: int = 2, *, stays: bool = False) -> None:
        self.intervals: list[int] = []
        self.num_open = 0
        self._error = error
        self._pictures = pictures
        self._stays = stays

    async def __call__(self, interval_ms: int) -> AsyncGenerator[pb.WatchStateResponse, None]:
        self.intervals.append(interval_ms)
        self.num_open += 1
        try:
            for _ in range(self._pictures):
                yield picture()
            if self._error is not None:
                raise self._error
            if self._stays:
                await asyncio.Event().wait()
        finally:
            self.num_open -= 1


def served(access: LiveAccess, watch: Watch | None = None, *, most: int = 8) -> Gateway:
    return gateway(Scheduler(), live=LiveView(access, lambda: watch, most=most))


def get(app: Gateway, path: str, headers: Sequence[tuple[bytes, bytes]] = HERE) -> Call:
    return ask(app, None, path=path, headers=headers, method="GET")


LOCAL = LiveAccess(local=True)


def test_the_page_runs_its_own_script_and_nothing_else() -> None:
    call = get(served(LOCAL), "/")
    page = b"".join(call.parts).decode()
    policy = call.headers["content-security-policy"]

    assert (call.status, call.headers["content-type"]) == (200, "text/html; charset=utf-8")
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy


def test_the_page_asks_nobody_else_for_anything_and_makes_no_markup_of_text() -> None:
    assert re.findall(r"https?://[^\"' )]+", PAGE) == ["http://www.w3.org/2000/svg"]  # the name of a namespace
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\sstyle=|\son[a-z]+=", PAGE)


def test_the_state_comes_as_events_and_names_no_tenant_to_who_has_no_key() -> None:
    watched = Watched()
    call = get(served(LOCAL, watched), "/live/state")

    assert call.status == 200 and watched.num_open == 0
    first, second = call.events
    assert first == second
    (executor,) = first["executors"]
    assert base64.b64decode(executor["cells"]) == bytes([1, 0, 3])
    assert [(row["request"], row["tenant"]) for row in executor["rows"]] == [("5", "tenant 1"), ("6.2", "tenant 2")]
    assert first["queues"] == [{"tenant": "tenant 2", "priority": "high", "sequences": 2, "tokens": 0, "age_s": 0.0}]
    assert first["tokens_per_s"] == 12.3
    assert "alice" not in b"".join(call.parts).decode()


def test_who_shows_the_key_sees_names_wherever_he_is() -> None:
    app = served(LiveAccess(key=KEY), Watched())
    elsewhere = (b"host", b"gpu.example:8000")

    assert get(app, "/", [elsewhere]).status == 200  # the page itself is no secret
    assert get(app, "/live/state", [elsewhere]).status == 401
    assert get(app, "/live/state", [elsewhere, (b"authorization", b"Bearer " + KEY[:-1].encode())]).status == 401
    call = get(app, "/live/state", [elsewhere, (b"authorization", f"Bearer {KEY}".encode())])
    assert call.status == 200
    assert call.events[0]["executors"][0]["rows"][0]["tenant"] == "alice"


@pytest.mark.parametrize("path", ["/", "/live/state"])
@pytest.mark.parametrize(
    ("access", "host"),
    [
        (LiveAccess(), b"127.0.0.1:8000"),
        (LOCAL, b"evil.example:8000"),  # a name that was made to mean 127.0.0.1
        (LOCAL, b"127.0.0.1.evil.example"),
        (LOCAL, b""),
    ],
)
def test_nobody_else_is_shown_anything_and_hears_which_flag_would_allow_it(
    path: str, access: LiveAccess, host: bytes
) -> None:
    watched = Watched()
    call = get(served(access, watched), path, [(b"host", host)])

    assert (call.status, call.json["error"]["message"]) == (403, NOT_SHOWN)
    assert watched.intervals == []


@pytest.mark.parametrize("host", [b"localhost:8000", b"127.0.0.1", b"[::1]:8000", b"LOCALHOST", b"localhost."])
def test_this_machine_is_shown_it_by_each_of_its_own_names(host: bytes) -> None:
    assert get(served(LOCAL, Watched()), "/live/state", [(b"host", host)]).status == 200


@pytest.mark.parametrize("path", ["/", "/live/state"])
@pytest.mark.parametrize(
    "header",
    [
        (b"x-forwarded-for", b"203.0.113.9"),
        (b"forwarded", b"for=203.0.113.9"),
        (b"x-real-ip", b"203.0.113.9"),
        (b"via", b"1.1 proxy"),
        (b"sec-fetch-site", b"cross-site"),
        (b"sec-fetch-site", b"same-site"),  # localhost at another port
    ],
)
def test_who_asks_through_a_proxy_or_from_another_page_is_not_this_machine(
    path: str, header: tuple[bytes, bytes]
) -> None:
    watched = Watched()

    assert get(served(LOCAL, watched), path, [*HERE, header]).status == 403
    assert get(served(LiveAccess(key=KEY), watched), "/", [*HERE, header]).status == 200
    assert watched.intervals == []


def test_a_proxy_that_says_nothing_of_itself_is_known_by_its_old_http() -> None:
    call = Call(None, "/live/state", HERE, "GET")
    call.scope["http_version"] = "1.0"

    asyncio.run(served(LOCAL, Watched())(call.scope, call.receive, call.send))
    assert call.status == 403


@pytest.mark.parametrize("site", [b"same-origin", b"none"])
def test_its_own_page_and_its_user_are(site: bytes) -> None:
    assert get(served(LOCAL, Watched()), "/live/state", [*HERE, (b"sec-fetch-site", site)]).status == 200


@pytest.mark.parametrize("watch", [None, Watched(Unavailable("no connection to unix:/secret/path"), pictures=0)])
def test_where_the_scheduler_cannot_be_asked_it_says_so_and_which_flag_helps(watch: Watch | None) -> None:
    call = get(served(LOCAL, watch), "/live/state")

    assert (call.status, call.json["error"]["message"]) == (503, NO_STATE)
    assert "--http-admin" in NO_STATE


def test_a_scheduler_that_ends_is_the_last_event() -> None:
    call = get(served(LOCAL, Watched(Unavailable("gone"))), "/live/state")

    assert call.status == 200
    assert call.events[-1]["error"]["message"] == NO_STATE


@pytest.mark.parametrize("asked", ["-5", "x", "1e3", "٣", "12345678"])
def test_an_interval_that_is_no_number_is_refused(asked: str) -> None:
    app = served(LOCAL, Watched())
    call = Call(None, "/live/state", HERE, "GET")
    call.scope["query_string"] = f"interval_ms={asked}".encode()

    async def run() -> None:
        await app(call.scope, call.receive, call.send)

    asyncio.run(run())
    assert (call.status, call.json["error"]["param"]) == (400, "interval_ms")


def test_only_so_many_views_are_open_and_the_scheduler_is_asked_no_more() -> None:
    watched = Watched()
    assert get(served(LOCAL, watched, most=0), "/live/state").status == 429
    assert get(served(LOCAL, Watched(Overloaded("16 watch already"), pictures=0)), "/live/state").status == 429
    assert watched.intervals == []


def test_a_gateway_that_stops_keeps_nobody_looking() -> None:
    app = served(LOCAL, Watched(pictures=1000))
    app.drain()
    assert get(app, "/live/state").status == 503


def test_a_view_ends_when_its_gateway_stops_and_not_an_interval_later() -> None:
    watched = Watched(pictures=1, stays=True)
    app = served(LOCAL, watched)
    call = Call(None, "/live/state", HERE, "GET")

    async def run() -> None:
        async with asyncio.timeout(HANG_S):
            looking = asyncio.create_task(app(call.scope, call.receive, call.send))
            while not call.parts:
                await asyncio.sleep(0)
            app.drain()
            await looking

    asyncio.run(run())
    assert (call.status, len(call.events), watched.num_open) == (200, 1, 0)


def test_a_key_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")

    assert read_access(str(file), is_local=False) == LiveAccess(key=KEY)
    assert read_access(str(file), is_local=True) == LiveAccess(key=KEY)
    assert read_access("", is_local=True) == LOCAL
    assert read_access("", is_local=False) == read_access("none", is_local=True) == LiveAccess()


@pytest.mark.parametrize("written", ["", "short", "two words are no key", "schlüsselschlüssel", "k" * 129])
def test_a_file_without_a_good_key_is_refused_in_words(tmp_path: Path, written: str) -> None:
    file = tmp_path / "key"
    file.write_text(written)

    with pytest.raises(PagewireError, match="must hold a key and nothing else, 16 to 128 printable characters"):
        read_access(str(file), is_local=False)
    with pytest.raises(PagewireError, match="No such file"):
        read_access(str(tmp_path / "other"), is_local=False)
