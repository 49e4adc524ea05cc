"""How a client shows its key, and when it refuses to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagewire import AsyncClient, Client
from pagewire.access import API_KEY, access
from services.api_keys import new_key
from tests.certificates import Authority

HERE = ("127.0.0.1:50051", "[::1]:50051", "localhost:50051", "unix:/run/pagewire")
ELSEWHERE = "10.0.0.1:50051"
KEY = new_key()


def shown(*servers: str, environment: dict[str, str] | None = None, **given: Any) -> dict[str, str]:
    return dict(access(servers, environment=environment or {}, **given).metadata)


def test_a_key_goes_with_every_call() -> None:
    assert shown(*HERE, api_key=KEY) == {"authorization": f"Bearer {KEY}"}
    assert shown(*HERE, api_key=KEY, metadata=(("x-trace", "1"),)) == {"x-trace": "1", "authorization": f"Bearer {KEY}"}
    assert shown(*HERE) == {}


def test_the_environment_has_the_key_of_who_is_given_none() -> None:
    environment = {API_KEY: KEY}
    assert shown(*HERE, environment=environment) == {"authorization": f"Bearer {KEY}"}
    other = new_key()
    assert shown(*HERE, environment=environment, api_key=other) == {"authorization": f"Bearer {other}"}
    assert shown(*HERE, environment=environment, api_key="") == {}, "an empty one is none"
    assert shown(*HERE, environment=environment, metadata=(("Authorization", "Basic x"),)) == {
        "authorization": "Basic x"
    }


@pytest.mark.parametrize("given", [{"api_key": KEY}, {"environment": {API_KEY: KEY}}], ids=["given", "environment"])
@pytest.mark.parametrize(
    "server", [ELSEWHERE, "example.org:443", "dns:///localhost:1", "localhost.evil.org:1", "[::]:1"]
)
def test_no_key_goes_over_a_network_in_the_clear(server: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="without TLS: give tls_ca, or say insecure=True") as refused:
        shown(HERE[0], server, **given)
    assert server in str(refused.value) and KEY[3:] not in str(refused.value)


def test_over_tls_or_where_somebody_says_so_it_does(authority: Authority) -> None:
    ways: list[dict[str, Any]] = [{"insecure": True}, {"tls_ca": "system"}, {"tls_ca": authority.ca}]
    for given in ways:
        assert shown(ELSEWHERE, api_key=KEY, **given) == {"authorization": f"Bearer {KEY}"}
    assert shown(ELSEWHERE) == {}, "without a key there is nothing to hide"


def test_tls_is_what_the_files_say(authority: Authority) -> None:
    pair = authority.issue("client")
    assert access(HERE, environment={}).credentials is None
    ways: list[dict[str, Any]] = [{"tls_ca": "system"}, {"tls_ca": authority.ca}]
    for given in ways:
        assert access(HERE, environment={}, **given).credentials is not None
    with_own = access(HERE, environment={}, tls_ca=authority.ca, tls_cert=pair.cert, tls_key=pair.key)
    assert with_own.credentials is not None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"tls_cert": "c", "tls_ca": "system"}, "tls_cert and tls_key go together"),
        ({"tls_key": "k", "tls_ca": "system"}, "tls_cert and tls_key go together"),
        ({"tls_cert": "c", "tls_key": "k"}, "tls_cert needs tls_ca"),
        ({"tls_ca": "system", "credentials": object()}, "do not go with them"),
        ({"api_key": KEY, "metadata": (("authorization", "Bearer x"),)}, "give one of them"),
        ({"api_key": "two words"}, "the API key is no key"),
        ({"api_key": "schlüssel"}, "the API key is no key"),
        ({"environment": {API_KEY: "a\nb"}}, f"{API_KEY} is no key"),
        ({"metadata": (("x", "schlüssel"),)}, "the value of the metadata 'x' cannot be sent"),
        ({"metadata": (("x", "two words\n"),)}, "the value of the metadata 'x' cannot be sent"),
        ({"metadata": (("a b", "two words"),)}, "metadata cannot be called 'a b'"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_said_without_the_key(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as refused:
        shown(*HERE, **given)
    assert not any(word in str(refused.value) for word in ("two words", "schlüssel", KEY))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="authorities"):
        shown(*HERE, tls_ca=tmp_path / "authorities")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_both_clients_refuse(kind: type[Client | AsyncClient], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"the API key is not sent to {ELSEWHERE} without TLS"):
        kind([HERE[0], ELSEWHERE], api_key=KEY)
    monkeypatch.setenv(API_KEY, KEY)
    with pytest.raises(ValueError, match=f"{API_KEY} is not sent to {ELSEWHERE} without TLS"):
        kind(f"{HERE[0]},{ELSEWHERE}")
    kind(ELSEWHERE, insecure=True)
