"""What a process listens on, as the kernel tells."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"
_GIVEN_BY_THE_KERNEL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def port_that_stays() -> int:
    """A port of loopback that is free now, and that nobody gets by chance while a server is started again on it.

    Those that the kernel gives to whoever asks for any, and to each connection that is dialled, are not among them.
    """
    with contextlib.suppress(OSError):  # of a system without such a file, or with few others, any port
        first = int(_GIVEN_BY_THE_KERNEL.read_text().split()[0])
        for port in (first - 1 - secrets.randbelow(first // 2) for _ in range(1000 if first > 4096 else 0)):
            with socket.socket() as free, contextlib.suppress(OSError):  # taken
                free.bind(("127.0.0.1", port))
                return port
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def listening(pid: int) -> set[str]:
    """IP addresses with ports that the process listens on, TCP and UDP."""
    inodes = set(_inodes(pid))
    found: set[str] = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in inodes and (words[3] == _LISTEN or table.startswith("udp")):
                host, _, port = words[1].partition(":")
                found.add(f"{_address(host)}:{int(port, 16)}")
    return found


def _inodes(pid: int) -> Iterator[str]:
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if match := re.fullmatch(r"socket:\[(\d+)\]", str(fd.readlink())):
                yield match[1]


def _address(digits: str) -> str:
    """An address of the kernel's tables: 32-bit words, each in the machine's own order."""
    words = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
