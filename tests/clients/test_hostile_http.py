"""The gateway under hostile HTTP, for seconds; `make hostile-http` goes on for ten minutes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 2}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accept", ["text/event-stream", "*/*"])
def test_a_stream_is_as_the_description_has_it(
    shared: Cluster, tmp_path: Path, path: str, asked: dict[str, Any], accept: str
) -> None:
    schemathesis = import_module("schemathesis")  # it warns as it starts
    with Gateway(shared.address, tmp_path / "log") as gateway:
        description = schemathesis.openapi.from_url(f"http://{gateway.http}/openapi.json")
        case = description[path]["POST"].Case(
            body={**asked, "stream": True}, media_type="application/json", headers={"accept": accept}
        )
        answer = case.call(base_url=f"http://{gateway.http}")

    assert answer.status_code == 200 and answer.text.endswith("\n\n")
    case.validate_response(answer)
