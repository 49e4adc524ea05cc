"""Hostile HTTP: schemathesis asks a live gateway whatever its OpenAPI description allows, and much that it does not.

`python -m tests.clients.hostile_http --minutes 10` does so for ten minutes, and tells which status how many got. A 5xx
that is not a declared overload fails it, and so does a status, a kind or a body that the description does not know.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.e2e import fake_model
from tests.e2e.cluster import cluster
from tests.e2e.gateways import Gateway

_CONFIG = Path(__file__).with_name("schemathesis.toml")
_STATUS = re.compile(r'^pagewire_gateway_requests_total\{path="([^"]+)",status="(\d+)"\} (\d+)', re.MULTILINE)


def attack(gateway: Gateway, *arguments: str, told: bool = False) -> subprocess.CompletedProcess[str]:
    """Run schemathesis to its end; with `told` it writes here, as it goes on."""
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), f"--config-file={_CONFIG}", "run", "--no-color"),
        *(f"http://{gateway.http}/openapi.json", f"--url=http://{gateway.http}", "--warnings=off"),
        *("--suppress-health-check=all", "--generation-database=none", "--request-timeout=60", *arguments),
    ]
    return subprocess.run(command, capture_output=not told, text=True, check=False)


def statuses(gateway: Gateway) -> Counter[int]:
    """How often the gateway answered with each status, to requests that ask for something."""
    found: Counter[int] = Counter()
    for _, status, count in _STATUS.findall(gateway.get("/metrics").text()):
        found[int(status)] += int(count)
    return found


def main() -> int:
    """What schemathesis returned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = fake_model.write(folder / "fake")
        with cluster(model, folder) as running, Gateway(running.address, folder / "gateway.log") as gateway:
            limit = f"--max-time={max(1, round(60 * asked.minutes))}"
            done = attack(gateway, limit, f"--seed={asked.seed}", "--continue-on-failure", told=True)
            print(f"answered with: {dict(sorted(statuses(gateway).items()))}")
            assert gateway.get("/health").json() == {"status": "serving"}
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
