"""Whether a tenant can tell by the clock that another has sent a prompt: `python -m tests.faults.timing`.

In every trial one tenant sends a new secret, and another a guess that is right or wrong by the toss of a coin. What the
second one sees of its own answer is kept: times on its own clock, times and counts that the server tells. For each of
these, and for a logistic fit of all of them, the area under the ROC curve says how well right and wrong are told apart
(0.5: not at all, 1: always). The fit is made on one half of the trials and judged on the other. Where both are the same
tenant the guess must be seen, or the trials would show nothing.

Steps of the fake model take one time whatever they compute, and `--token-budget` lets a step compute one block: every
block that is found in a cache saves a step. With `--real` the model computes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import uvloop
from grpc import aio
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from services.api_keys import line_of, new_key
from services.model_store import find
from tests.e2e import fake_model
from tests.e2e.cluster import cluster

BLOCK: Final = 16
FEATURES: Final = (
    "time to first token",
    "time between tokens",
    "whole time",
    "cached_prompt_tokens",
    "queue_ns",
    "prefill_ns",
    "decode_ns",
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """How well right and wrong guesses were told apart."""

    num_blocks: int
    load: int  # streams of a third tenant
    same_tenant: bool  # the control
    trials: int
    areas: dict[str, float]  # by feature, and "all of them"


def area(right: Floats, wrong: Floats) -> float:
    """Area under the ROC curve: the chance that a right one is smaller than a wrong one, ties counted half."""
    values = np.concatenate([right, wrong])
    order = np.sort(values)
    ranks = (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") + 1) / 2
    above = ranks[len(right) :].sum() - len(wrong) * (len(wrong) + 1) / 2
    return float(above / (len(right) * len(wrong)))


def fitted_area(rows: Floats, is_right: NDArray[np.bool_]) -> float:
    """Area of a logistic fit: made on the even trials, judged on the odd ones."""
    spread = rows.std(axis=0)
    useful = spread > 0
    if not useful.any():
        return 0.5
    scaled = (rows[:, useful] - rows[:, useful].mean(axis=0)) / spread[useful]
    scaled = np.hstack([np.clip(scaled, -5, 5), np.ones((len(rows), 1))])
    x, y = scaled[::2], is_right[::2].astype(float)
    weights = np.zeros(x.shape[1])
    for _ in range(50):  # Newton's steps, held back a little so that a clean split does not run away
        chance = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (y - chance) - 1e-2 * weights
        curve = (x.T * (chance * (1 - chance))) @ x + 1e-2 * np.eye(len(weights))
        weights += np.linalg.solve(curve, slope)
    scores = scaled[1::2] @ weights
    return area(-scores[is_right[1::2]], -scores[~is_right[1::2]])


class Tenant:
    """One caller."""

    def __init__(self, channel: aio.Channel, key: str) -> None:
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {key}"),)

    async def ask(self, prompt: Sequence[int], max_tokens: int) -> list[float]:
        """What one answer lets its caller see: the FEATURES."""
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(temperature=0),
            stopping=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        )
        began = time.perf_counter()
        times: list[float] = []
        usage = pb.Usage()
        async for message in self._stub.GenerateStream(request, metadata=self._metadata):
            if message.HasField("delta"):
                times.append(time.perf_counter() - began)
            elif message.HasField("finish"):
                usage = message.finish.usage
        between = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        return [
            *(times[0], between, times[-1], -float(usage.cached_prompt_tokens)),
            *(float(usage.queue_ns), float(usage.prefill_ns), float(usage.decode_ns)),
        ]


async def measure(
    victim: Tenant, prober: Tenant, *, num_blocks: int, trials: int, vocab_size: int, rng: random.Random
) -> dict[str, float]:
    """The areas that these trials give."""
    rows: list[list[float]] = []
    coins: list[bool] = []

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    for _ in range(trials):
        secret = tokens(BLOCK * num_blocks)
        coins.append(rng.random() < 0.5)
        await victim.ask(secret + tokens(2), 1)
        rows.append(await prober.ask((secret if coins[-1] else tokens(BLOCK * num_blocks)) + tokens(2), 4))
    table, is_right = np.array(rows), np.array(coins)
    areas = {name: area(table[is_right, i], table[~is_right, i]) for i, name in enumerate(FEATURES)}
    return {**areas, "all of them": fitted_area(table, is_right)}


async def run(options: argparse.Namespace) -> list[Found]:
    """All settings, each with its control."""
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = find(options.real) if options.real else fake_model.write(folder / "fake")
        assert model is not None, f"{options.real} is not here: pagewire pull {options.real}"
        keys = {tenant: new_key() for tenant in ("victim", "prober", "crowd")}
        (folder / "keys").write_text("".join(f"{line_of(tenant, key)}\n" for tenant, key in keys.items()))
        flags = ["--api-keys", str(folder / "keys"), *(() if options.real else ("--token-budget", str(BLOCK)))]
        with cluster(model, folder, executors=0, flags=flags) as running:
            if options.real:
                running.start_executor(fake=False)
            else:
                running.start_executor(f"--fake-step-s={options.step_ms / 1000}")
            vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
            async with aio.insecure_channel(running.address) as channel:
                tenants = {tenant: Tenant(channel, key) for tenant, key in keys.items()}
                for load in options.load:
                    crowd = [asyncio.create_task(_crowd(tenants["crowd"], i, vocab_size)) for i in range(load)]
                    for num_blocks in options.blocks:
                        for same in (True, False):
                            trials = max(200, options.trials // 10) if same else options.trials
                            areas = await measure(
                                tenants["victim"],
                                tenants["victim" if same else "prober"],
                                num_blocks=num_blocks,
                                trials=trials,
                                vocab_size=vocab_size,
                                rng=random.Random(options.seed),
                            )
                            found.append(
                                Found(num_blocks=num_blocks, load=load, same_tenant=same, trials=trials, areas=areas)
                            )
                            print(row_of(found[-1]), flush=True)
                    for task in crowd:
                        task.cancel()
                    await asyncio.gather(*crowd, return_exceptions=True)
    return found


async def _crowd(tenant: Tenant, seed: int, vocab_size: int) -> None:
    rng = random.Random(f"crowd {seed}")
    while True:
        await tenant.ask([rng.randrange(vocab_size) for _ in range(rng.randrange(8, 200))], rng.randrange(4, 40))


def row_of(found: Found) -> str:
    """A row of the table in RESULTS.md."""
    who = "same (control)" if found.same_tenant else "another"
    cells = [
        who,
        f"{found.num_blocks}",
        f"{found.load}",
        f"{found.trials}",
        *(f"{a:.3f}" for a in found.areas.values()),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Exit code 1 where a tenant sees another's guess, 2 where even the control does not see its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5000, help="of each setting, half of them right")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4, 16], help="blocks of a secret")
    parser.add_argument("--load", type=int, nargs="+", default=[0, 2], help="streams of a third tenant meanwhile")
    parser.add_argument("--step-ms", type=float, default=1.0, help="of the fake model")
    parser.add_argument("--real", default="", metavar="MODEL", help="compute with this model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    heads = ["tenant", "blocks", "load", "trials", *FEATURES, "all of them"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    found = uvloop.run(run(options))
    seen = [f for f in found if not f.same_tenant and any(abs(a - 0.5) > 0.03 for a in f.areas.values())]
    blind = [f for f in found if f.same_tenant and f.areas["all of them"] < 0.95]
    return 2 if blind else 1 if seen else 0


if __name__ == "__main__":
    raise SystemExit(main())
