"""What a scheduler may bind, and with what."""

from __future__ import annotations

import resource
from dataclasses import replace

import pytest

from common.config import SchedulerConfig
from services.lifecycle import StartupError, check_binds, is_local, take_descriptors

OPEN = "0.0.0.0:50051"
PLAIN = SchedulerConfig()
CLIENTS = replace(PLAIN, listen=OPEN, tls_cert="c", tls_key="k", api_keys="f")
EXECUTORS = replace(PLAIN, link_listen=OPEN, link_tls_cert="c", link_tls_key="k", link_tls_ca="a")


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        replace(PLAIN, listen="[::1]:1", link_listen="localhost:2"),
        replace(PLAIN, listen="unix:/run/clients", link_listen="unix:/run/link"),
        CLIENTS,
        EXECUTORS,
        replace(CLIENTS, tls_client_ca="a"),
        replace(PLAIN, listen=OPEN, link_listen=OPEN, insecure=True),
    ],
)
def test_what_only_this_machine_can_reach_or_is_protected_may_be_bound(config: SchedulerConfig) -> None:
    check_binds(config)


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (replace(PLAIN, listen=OPEN), "--tls-cert --tls-key --api-keys"),
        (replace(CLIENTS, api_keys=""), "--api-keys"),
        (replace(CLIENTS, tls_cert="", tls_key=""), "--tls-cert --tls-key"),
        (replace(CLIENTS, api_keys="", tls_client_ca="a"), "--api-keys"),
        (replace(PLAIN, link_listen=OPEN), "--link-tls-cert --link-tls-key --link-tls-ca"),
        (replace(EXECUTORS, link_tls_ca=""), "--link-tls-ca"),
    ],
)
def test_what_others_can_reach_is_refused_with_what_to_type(config: SchedulerConfig, needed: str) -> None:
    with pytest.raises(StartupError) as refused:
        check_binds(config)

    assert str(refused.value) == (
        f"{OPEN} can be reached from other machines. Protect it with {needed}, bind 127.0.0.1, or type --insecure if "
        "the network itself is trusted."
    )


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "[::]:1", "192.168.1.2:1", "10.0.0.1:1", "example.org:1", "localhost.evil.org:1", "*:1"]
)
def test_a_name_or_an_address_that_may_be_anybodys_is_not_local(address: str) -> None:
    assert not is_local(address)


@pytest.mark.parametrize("insecure", [False, True], ids=["", "insecure"])
@pytest.mark.parametrize("keys", [False, True], ids=["no keys", "keys"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("listen", ["127.0.0.1:1", "unix:/run/x", OPEN, "[::]:1", "example.org:1"])
def test_clients_are_let_in_from_elsewhere_with_tls_and_keys_or_by_word(
    listen: str, *, tls: bool, keys: bool, insecure: bool
) -> None:
    config = replace(
        PLAIN,
        listen=listen,
        tls_cert="c" if tls else "",
        tls_key="k" if tls else "",
        api_keys="f" if keys else "",
        insecure=insecure,
    )
    assert starts(config) is (listen.startswith(("127", "unix")) or (tls and keys) or insecure)


@pytest.mark.parametrize("insecure", [False, True], ids=["", "insecure"])
@pytest.mark.parametrize("given", ["", "cert key", "cert key ca"])
@pytest.mark.parametrize("listen", ["127.0.0.1:1", "unix:/run/x", OPEN, "[::]:1", "example.org:1"])
def test_executors_are_let_in_from_elsewhere_with_certificates_of_both_or_by_word(
    listen: str, given: str, *, insecure: bool
) -> None:
    files = {f"link_tls_{name}": name for name in given.split()}
    config = replace(PLAIN, link_listen=listen, insecure=insecure, **files)  # type: ignore[arg-type]
    assert starts(config) is (listen.startswith(("127", "unix")) or given == "cert key ca" or insecure)


def starts(config: SchedulerConfig) -> bool:
    try:
        check_binds(config)
    except StartupError:
        return False
    return True


def test_a_server_takes_all_the_descriptors_that_it_may_have() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
    try:
        take_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
