"""The gateway under hostile HTTP, for seconds; `make hostile-http` goes on for ten minutes."""

from __future__ import annotations

from pathlib import Path

from tests.clients.hostile_http import attack, statuses
from tests.clients.needed import needs
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway

needs("schemathesis")


def test_no_request_gets_a_5xx_that_is_not_a_declared_overload(shared: Cluster, tmp_path: Path) -> None:
    with Gateway(shared.address, tmp_path / "log") as gateway:
        done = attack(gateway, "--seed=1", "--max-examples=8", "--phases=fuzzing")
        told = statuses(gateway)
        alive = gateway.get("/health").json()

    assert done.returncode == 0, done.stdout + done.stderr
    assert set(told) <= {200, *range(400, 500), 503} and told[200] and told[400]
    assert alive == {"status": "serving"}
