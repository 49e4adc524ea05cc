"""grpc-requests, which knows of a server what reflection tells: it asks for health, an answer and a stream."""

from __future__ import annotations

import json
import sys

from tests.clients.needed import needs
from tests.e2e.cluster import Cluster
from tests.e2e.programs import run

needs("grpc_requests")

# Its messages are made from what it was told, so it must not meet those of this process.
PROGRAM = """
import json, sys
from grpc_requests import Client
client = Client(sys.argv[1])
service = "pagewire.v1.InferenceService"
asked = {"text": "hello", "sampling": {"temperature": 0}, "stopping": {"max_tokens": 4}}
print(json.dumps({
    "services": sorted(client.service_names),
    "health": client.request("grpc.health.v1.Health", "Check", {}),
    "answer": client.request(service, "Generate", asked)["choices"][0]["text"],
    "stream": [m.get("delta", {}).get("text", "") for m in client.request(service, "GenerateStream", asked)],
}))
"""


def test_grpc_requests_asks_what_reflection_tells_of(shared: Cluster) -> None:
    ended = run(sys.executable, "-c", PROGRAM, shared.address)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)

    assert {"grpc.health.v1.Health", "pagewire.v1.InferenceService"} <= set(told["services"])
    assert told["health"] == {"status": "SERVING"}
    assert told["answer"] == "".join(told["stream"]) == "&'()"
