"""Addresses of servers, as people type them: HOST:PORT, [V6]:PORT, unix:PATH; and their names, as HTTP has them."""

from __future__ import annotations

import ipaddress
import re


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    bare_v6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not colon or not host or bare_v6 or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT, for example 127.0.0.1:50051 or [::1]:50051")
    return host.strip("[]"), int(port)


def is_local(address: str) -> bool:
    """Whether only this machine can reach the address, a Unix socket or loopback. Raises ValueError if it is none."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = split_address(address)[0]
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def name_of(host: str) -> str:
    """The name, or the address, in a Host header: without its port, and as it is compared."""
    return re.sub(r":\d*$", "", host.lower()).removesuffix(".")


def is_loopback(name: str) -> bool:
    """Whether what `name_of` gave means this machine for everybody: no browser asks others what localhost is."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
