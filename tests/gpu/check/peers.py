"""Stage 7: engines that are found installed, on the same workload and the same folder. Nothing of theirs is here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.gpu.check.checkpoint import model_folder
from tests.gpu.check.parts import Check, Found, Part, Skipped

ROOT = Path(__file__).resolve().parents[3]


def parts(check: Check) -> list[Part]:
    """A process for each."""
    names = ["pretended"] if check.fake else ["nanovllm", "minisgl", "transformers"]
    return [Part(name=name, work=partial(peer, engine=name), takes_s=40, limit_s=200) for name in names]


def peer(check: Check, *, engine: str) -> Found:
    """Its tokens a second: from handing over the first prompt to the last token of all, the middle one of its runs."""
    if engine != "pretended" and find_spec(engine) is None:
        raise Skipped(f"{engine} is not installed")
    folder = model_folder(check.folder, check.device, fake=check.fake)
    if not check.fake:
        import torch  # noqa: PLC0415

        torch.cuda.empty_cache()
    log = check.out / f"peer-{engine}.log"
    command = [
        *(sys.executable, "-m", "tests.gpu.check.peer_engines", "--engine", engine, "--model", str(folder)),
        *("--until", str(min(check.until_s, time.monotonic() + 150) - 15), *(("--tiny",) if check.fake else ())),
    ]
    with log.open("w") as errors:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
        )
    with log.open("a") as out:
        out.write(done.stdout)
    told: list[dict[str, Any]] = [
        json.loads(line.removeprefix("told ")) for line in done.stdout.splitlines() if line.startswith("told ")
    ]
    runs = sorted(each["per_s"] for each in told if "per_s" in each)
    found = Found(values={"told": told})
    if runs:
        found.values["output_tokens_per_s"] = runs[len(runs) // 2]
        ours = check.earlier.get("server/nano-vLLM's workload", {}).get("output_tokens_per_s")
        beside = f", ours {ours:,.0f}: {ours / runs[len(runs) // 2]:.2f} times as many" if ours else ""
        found.lines.append(f"{engine}: {runs[len(runs) // 2]:,.0f} output tokens/s, of {len(runs)} runs{beside}")
    if done.returncode or not runs:
        last = " ".join(line for line in log.read_text(errors="replace").split("\n")[-12:] if line.strip())[-400:]
        found.problems.append(f"{engine} ended with exit code {done.returncode}: {last}")
    return found
