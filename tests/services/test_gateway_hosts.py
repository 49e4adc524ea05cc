"""By which names a gateway may be called: a page of another site calls it by that site's, whatever that means."""

from __future__ import annotations

import pytest

from common.errors import PagewireError
from services.gateway.hosts import Hosts, read_hosts
from tests.services.gateway_calls import CHAT, HI, Call, Scheduler, ask, delta, finish, gateway

EVIL = b"rebind.evil.example:8000"
LOCAL = read_hosts("", is_local=True)


def called(hosts: Hosts, *names: bytes, path: str = CHAT, method: str = "POST") -> tuple[Call, Scheduler]:
    scheduler = Scheduler(delta(0, 5, "a"), finish())
    headers = [(b"host", name) for name in names]
    return ask(gateway(scheduler, hosts=hosts), HI, path=path, method=method, headers=headers), scheduler


@pytest.mark.parametrize(
    ("path", "method"),
    [
        (CHAT, "POST"),
        ("/v1/models", "GET"),
        ("/metrics", "GET"),
        ("/openapi.json", "GET"),
        ("/live/state", "GET"),
        ("/health/", "GET"),
    ],
)
def test_a_page_whose_name_was_made_to_mean_this_machine_gets_nothing(path: str, method: str) -> None:
    call, scheduler = called(LOCAL, EVIL, path=path, method=method)

    error = call.json["error"]
    assert (call.status, error["type"], error["code"]) == (403, "invalid_request_error", "host_not_allowed")
    assert error["param"] == "Host" and "--http-hosts" in error["message"] and "evil" not in error["message"]
    assert scheduler.streams == []


@pytest.mark.parametrize(
    "name",
    [
        b"localhost",
        b"LocalHost.:8000",
        b"app.localhost:8000",
        b"127.0.0.1:8000",
        b"127.1.2.3",
        b"[::1]",
        b"[::1]:8000",
    ],
)
def test_loopback_is_called_by_each_of_its_names_also_where_others_are_allowed(name: bytes) -> None:
    assert [called(hosts, name)[0].status for hosts in (LOCAL, read_hosts("a.example", is_local=False))] == [200, 200]


@pytest.mark.parametrize(
    "name",
    [
        b"",
        b"localhost.evil.example",
        b"evil.example#localhost",
        b"127.0.0.1.evil.example",
        b"127.0.0.1:80:80",
        b"notlocalhost",
        b"10.0.0.7",
        b"0.0.0.0:8000",
        b"[::]:8000",
        b"\xff",
    ],
)
def test_what_only_looks_like_it_is_another_name(name: bytes) -> None:
    assert called(LOCAL, name)[0].status == 403


def test_one_name_of_several_does_not_speak_for_the_others() -> None:
    assert called(LOCAL, b"localhost", EVIL)[0].status == called(LOCAL, EVIL, b"localhost")[0].status == 403


def test_who_says_no_name_at_all_is_no_browser() -> None:
    assert called(LOCAL)[0].status == 200


@pytest.mark.parametrize("path", ["/live", "/ready"])
def test_a_probe_calls_it_as_it_likes(path: str) -> None:
    assert called(LOCAL, EVIL, path=path, method="GET")[0].status == 200


@pytest.mark.parametrize("is_local", [True, False])
def test_the_names_that_an_operator_lists_are_its_own_and_no_others(is_local: bool) -> None:
    hosts = read_hosts(" gpu.Example. , 10.0.0.7,[fd00:0::7],fd00::8", is_local=is_local)

    for name in (b"GPU.example:8000", b"gpu.example.", b"10.0.0.7:80", b"[fd00::7]:8000", b"[fd00::8]"):
        assert called(hosts, name)[0].status == 200, name
    for name in (EVIL, b"example", b"a.gpu.example", b"10.0.0.8"):
        assert called(hosts, name)[0].status == 403, name


@pytest.mark.parametrize(("setting", "is_local"), [("*", True), ("gpu.example, *", True), ("", False)])
def test_any_name_is_let_through_where_an_operator_says_so_or_others_can_ask_anyway(
    setting: str, is_local: bool
) -> None:
    assert called(read_hosts(setting, is_local=is_local), EVIL)[0].status == 200


@pytest.mark.parametrize(
    "setting", ["http://gpu.example", "gpu.example:8000", "a b", "*.example", "a,,b", ",", "bücher.example"]
)
def test_a_setting_that_is_no_name_is_refused_in_words(setting: str) -> None:
    with pytest.raises(PagewireError, match=r"--http-hosts: .* is no name\. Give those that callers type"):
        read_hosts(setting, is_local=True)
