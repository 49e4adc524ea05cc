"""Which cut of a product with few rows is the fastest here: python -m tests.gpu.check.sweep --out FOLDER --budget 120.

Every matrix of both models, every cut that may be good, against torch's product and against float64: a cut that is
wrong, or does not compile, is told and not timed. Then whole decode steps, with torch's products and with ours, with
kernels that begin before their predecessor ends and without. What it finds goes into the table of
executor/gpu/kernels/skinny.py by hand: the end of what it prints can be pasted there.

Three kinds of process: this one, which holds no tensor; some that compile beside each other before anything is timed;
and one that measures, which is started again behind the task that took it down.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

    from executor.gpu.kernels.skinny import Cut, SkinnyLinears
    from tests.gpu.check.shapes import Shape

ROOT: Final = Path(__file__).resolve().parents[3]
ROWS: Final = (1, 8, 16, 32, 64)
WORST: Final = 1e-2  # of the largest number: bfloat16 rounds to 0.4 %
CONTEXT: Final = 512
_FROM_TORCH: Final = 0.1  # of the largest logit: sums in another order, through all layers of a random model

_COMPILERS: Final = 12
_COMPILE_SHARE: Final = 0.4  # of the budget, at most
_STEPS_S: Final = 40.0  # of the budget, for whole steps
_LIVES: Final = 6
_BYTES_PER_S: Final = 3.03e12  # of an H100, measured: only to print shares of it
_REGISTERS: Final = 224  # bytes of weights a lane may hold
_SHARED: Final = 200 << 10


_EVERY: Final = ("torch", False), ("torch", True), ("ours", False), ("ours", True), ("best", True), ("fused", True)
_BRIEF: Final = ("torch", True), ("best", True), ("fused", True)


@dataclass(slots=True)
class _Asked:
    """What the command line says to every process."""

    only: str = ""  # "cuts" or "steps"
    rows: list[int] = field(default_factory=lambda: [1, 16, 64, 32])  # padded; in the order in which they matter
    brief: bool = False

    @property
    def modes(self) -> tuple[tuple[str, bool], ...]:
        """Whose products, and whether kernels overlap. "fused" has norms and additions within ours, too: of one row."""
        return _BRIEF if self.brief else _EVERY

    def arguments(self) -> list[str]:
        """For another process."""
        told = ["--rows", ",".join(map(str, self.rows))]
        return told + (["--only", self.only] if self.only else []) + (["--brief"] if self.brief else [])


_asked = _Asked()


# ---- what is tried

_SLICED: Final = {  # padded rows → block_n, block_k, slices, warps
    16: (
        (8, 1024, 8, 8), (8, 1024, 4, 4), (16, 1024, 8, 8), (32, 1024, 8, 8), (8, 512, 4, 4), (16, 512, 4, 4),
        (32, 512, 8, 8), (16, 1024, 16, 16), (32, 1024, 16, 16), (8, 2048, 8, 8), (16, 256, 4, 4),
    ),
    32: ((8, 1024, 8, 8), (16, 512, 8, 8), (32, 512, 8, 8), (16, 1024, 16, 16), (32, 512, 16, 16)),
    64: ((8, 512, 8, 8), (16, 512, 8, 8), (32, 512, 8, 8), (32, 256, 4, 8), (32, 512, 16, 16)),
}  # fmt: skip


def candidates(outputs: int, inputs: int, rows: int, *, fake: bool = False) -> list[Cut]:
    """Cuts that may be good, for 1, 16, 32 or 64 rows. The one in force comes first."""
    from executor.gpu.kernels.skinny import MOST_HELD, Cut, cut_of, thumb  # noqa: PLC0415 - imports triton

    found = [cut_of(outputs, inputs, rows) or thumb(outputs, inputs, rows)]
    if fake:
        return [*found, Cut(block_n=16, block_k=32, splits=2)]
    small = 2 * outputs * inputs <= 32 << 20

    def add(
        block_n: int, block_k: int, warps: int, stages: int, *, programs: int = 0, slices: int = 1, **flags: bool
    ) -> None:
        tiles, blocks = -(-outputs // block_n), -(-inputs // block_k)
        splits = max(1, min(round(programs / tiles), blocks)) if programs else 1
        steps = -(-blocks // splits)
        splits = -(-blocks // steps)
        cut = Cut(
            block_n=block_n, block_k=block_k, splits=splits, slices=slices, num_warps=warps, num_stages=stages, **flags
        )
        if flags.get("held"):
            fits = steps <= MOST_HELD and 2 * steps * block_n * block_k <= _REGISTERS * 32 * warps
        else:
            fits = stages * 2 * block_k * (block_n + rows) <= _SHARED and steps >= 2
        if fits and splits <= 16 and cut not in found:
            found.append(cut)

    wide = min(1024, inputs)
    if rows == 1:
        if small:
            for block_n, warps in ((4, 4), (8, 4), (8, 8), (16, 8), (2, 4)):
                add(block_n, wide, warps, 4, held=True)
            add(16, wide, 8, 4, held=True, programs=528)
        add(4, wide, 4, 4)
        add(8, wide, 4, 3)
        add(8, wide, 8, 4)
        add(8, 512, 4, 5)
        add(16, 512, 8, 4)
        if not small:
            add(8, wide, 8, 4, held=True, programs=10**6)
            add(16, 512, 4, 4)
            add(32, 256, 8, 4)
        return found
    if small:
        for block_n, block_k, warps in ((16, 256, 4), (32, 128, 4), (32, 256, 8), (64, 128, 8), (64, 256, 8)):
            if rows < 64 or block_n >= 32:
                for programs in (132,) if rows == 32 else (132, 264):
                    add(block_n, block_k, warps, 4, held=True, programs=programs)
    if small:
        for block_n, block_k, slices, warps in _SLICED[rows]:
            if block_k <= inputs:
                add(block_n, block_k, warps, 4, held=True, slices=slices)
    for programs in (264,) if rows == 32 else (132, 264, 528):
        if rows <= 32:
            add(16, 256, 4, 4, programs=programs)
            add(32, 256, 4, 3, programs=programs)
            add(32, 128, 4, 5, programs=programs)
        add(64, 128, 4, 4, programs=programs)
        add(64, 128, 4, 4, programs=programs, turned=True)
        add(128, 64, 4, 4, programs=programs, turned=True)
        if rows == 64:
            add(64, 64, 4, 5, programs=programs)
            add(128, 64, 8, 4, programs=programs)
    return found if small else [cut for cut in found if cut.block_n > 16]


def matrices(shape: Shape) -> list[tuple[int, int]]:
    """(outputs, inputs) of a layer's, and of the one that makes logits."""
    return [(outputs, inputs) for inputs, outputs in shape.size.linears] + [(shape.size.vocabulary, shape.size.hidden)]


def closes(outputs: int, inputs: int, rows: int, *, fake: bool = False) -> bool:
    """Whether a norm follows this product, which may add the parts of its sums: those behind attention and the gate."""
    return rows > 1 and any((outputs, inputs) in matrices(shape)[1::2] for shape in shapes(fake=fake))


def shapes(*, fake: bool) -> list[Shape]:
    """The models."""
    from tests.gpu.check.shapes import LLAMA_3_8B, QWEN3_0_6B, TINY_QWEN3  # noqa: PLC0415 - imports torch

    return [TINY_QWEN3] if fake else [QWEN3_0_6B, LLAMA_3_8B]


def classes(*, fake: bool) -> list[int]:
    """Padded rows, in the order in which they matter."""
    return [1, 16] if fake else _asked.rows


def cases(*, fake: bool) -> Iterator[tuple[int, int, int]]:
    """(outputs, inputs, padded rows) of all that is cut; matrices that both models have once."""
    seen = set[tuple[int, int, int]]()
    for shape in shapes(fake=fake):
        for rows in classes(fake=fake):
            for outputs, inputs in matrices(shape)[3:4] if fake else matrices(shape):
                if (outputs, inputs, rows) not in seen:
                    seen.add((outputs, inputs, rows))
                    yield outputs, inputs, rows


# ---- the notes


class Notes:
    """A line for each task that began, and for each that ended."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **fields: Any) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def read(self) -> dict[str, dict[str, Any]]:
        """Task → what came of it; {"problem": ...} where its process did not live to tell."""
        found: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    note = json.loads(line)
                    task = note.pop("task")
                    found[task] = note if "began" not in note else {"problem": "its process died"}
        return found


# ---- compiling


class Product:
    """One cut at work, with the norm behind it where there is one. `product` (T, outputs) is what it made."""

    def __init__(self, linears: SkinnyLinears, x: torch.Tensor, outputs: int, cut: Cut, *, fake: bool = False) -> None:
        import torch  # noqa: PLC0415

        from executor.gpu.kernels.skinny import padded_rows  # noqa: PLC0415 - imports triton

        self._linears, self._x, self._cut = linears, x, cut
        self._closes = closes(outputs, x.shape[1], len(x), fake=fake)
        self.product = torch.zeros(len(x), outputs, dtype=x.dtype, device=x.device)
        self._room, self._out, self._norm = (torch.ones_like(self.product) for _ in range(3))
        linears.reserve(outputs, padded_rows(len(x)), cut)

    def __call__(self, weight: torch.Tensor) -> None:
        """Where it closes, the product is added to what is there."""
        if self._closes:
            self._linears.launch_normed(
                self._x, weight, None, self.product, self._norm[0], 1e-6, room=self._room, out=self._out, cut=self._cut
            )
        else:
            self._linears.launch(self._x, weight, None, self.product, cut=self._cut)


def compile_cuts(part: int, parts: int) -> None:
    """Launch every `parts`-th cut once. What fails is found again, and told, by whoever measures."""
    import torch  # noqa: PLC0415 - seconds

    from executor.gpu.kernels.skinny import SkinnyLinears  # noqa: PLC0415 - imports triton

    device = torch.device("cuda", 0)
    work = [(*case, cut) for case in cases(fake=False) for cut in candidates(*case)]
    linears = SkinnyLinears(device)
    for outputs, inputs, rows, cut in work[part::parts]:
        weight, x = (torch.zeros(n, inputs, device=device, dtype=torch.bfloat16) for n in (outputs, rows))
        with contextlib.suppress(Exception):
            Product(linears, x, outputs, cut)(weight)
            torch.cuda.synchronize()


def compile_model(name: str, overlapped: bool) -> None:
    """Run the steps that will be timed, through one layer."""
    from executor.gpu.kernels.overlap import without_overlap  # noqa: PLC0415 - imports triton

    shape = next(shape for shape in shapes(fake=False) if shape.name == name)
    model = _Model(replace(shape, size=replace(shape.size, layers=1)), fake=False)
    for rows in ROWS:
        with contextlib.nullcontext() if overlapped else without_overlap():
            model.fuse(on=False)
            model.step(rows)()
    with contextlib.nullcontext() if overlapped else without_overlap():
        model.fuse(on=True)
        model.step(1)()


def compile_all(out: Path, budget_s: float, say: Callable[[str], None]) -> None:
    """In processes of their own. Those that are not done in time are ended: what is left is compiled when needed."""
    switch = (1,) if _asked.brief else (0, 1)
    what = [f"model:{shape.name}:{on}" for shape in shapes(fake=False) for on in switch if _asked.only != "cuts"]
    what += [f"cuts:{part}:{_COMPILERS}" for part in range(_COMPILERS) if _asked.only != "steps"]
    began_s = time.monotonic()
    with (out / "compile.log").open("w") as log:
        running = [_start("--compile", each, stdout=log) for each in what]
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, budget_s - (time.monotonic() - began_s)))
        late = [process for process in running if process.poll() is None]
        for process in late:
            process.kill()
        for process in late:
            process.wait()
    say(f"compiled in {time.monotonic() - began_s:.0f} s, {len(late)} of {len(running)} processes were not done")


def _start(*arguments: str, stdout: Any = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-u", "-m", "tests.gpu.check.sweep", *_asked.arguments(), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.STDOUT if stdout else None)


# ---- measuring


class Measurer:
    """The process that has the device for itself."""

    def __init__(self, out: Path, *, fake: bool, until_s: float) -> None:
        import torch  # noqa: PLC0415 - seconds

        from executor.gpu.kernels.skinny import SkinnyLinears  # noqa: PLC0415 - imports triton

        self._fake, self._until_s = fake, until_s
        self._device = torch.device("cpu") if fake else torch.device("cuda", 0)
        self._dtype = torch.float32 if fake else torch.bfloat16
        self._notes = Notes(out / "sweep.jsonl")
        self._done = self._notes.read()
        self._linears = SkinnyLinears(self._device)

    def run(self) -> None:
        """All tasks that nobody did yet."""
        from executor.gpu.kernels.overlap import without_overlap  # noqa: PLC0415 - imports triton

        self._task("overlap", self._overlap)
        works = "problem" not in self._done.get("overlap", {})
        with contextlib.nullcontext() if works else without_overlap():
            for case in cases(fake=self._fake) if _asked.only != "steps" else ():
                if self._until_s - time.monotonic() > (0 if self._fake or _asked.only else _STEPS_S):
                    self._matrix(*case)
        if _asked.only == "cuts":
            return
        self.put_in_force()
        if not self._fake:
            self._done.pop("compile", None)
            self._task("compile", self._compile)  # in the threads of this process, which has the device for itself
        for shape in shapes(fake=self._fake):
            self._steps(shape)

    def put_in_force(self) -> None:
        """The best cuts, before a model is made that reserves memory for them."""
        from executor.gpu.kernels.skinny import CUTS, Cut  # noqa: PLC0415 - imports triton

        for case, found in best_cuts(self._notes.read()).items():
            CUTS[case] = Cut(**found["cut"])

    def _overlap(self) -> dict[str, Any]:
        """A long chain of kernels, each of which needs what the one before it wrote, in a graph."""
        import torch  # noqa: PLC0415

        from executor.gpu.kernels.norm import add_rms_norm  # noqa: PLC0415 - imports triton
        from executor.gpu.kernels.overlap import without_overlap  # noqa: PLC0415
        from tests.gpu.check.timing import capture  # noqa: PLC0415

        torch.manual_seed(0)
        x = torch.randn(64, 1024, device=self._device).to(self._dtype)
        weight, residual = torch.ones_like(x[0]), torch.empty_like(x)
        out = torch.empty_like(x)

        def chain() -> None:
            torch.add(x, 0.0, out=residual)
            add_rms_norm(x, residual, weight, 1e-6, out=out)
            for _ in range(2 if self._fake else 100):
                add_rms_norm(out, residual, weight, 1e-6, out=out)

        with without_overlap():
            chain()
            wanted = (out.clone(), residual.clone())
        chain()
        replay = chain if self._fake else capture([chain]).replay
        for _ in range(5):
            out.fill_(torch.nan)
            replay()
            if not (torch.equal(out, wanted[0]) and torch.equal(residual, wanted[1])):
                return {"problem": "kernels that begin early see what is not there yet"}
        return {"holds": True}

    def _compile(self) -> dict[str, Any]:
        """What the steps need beside what was timed: without overlap, and one row with what lies around its product."""
        import torch  # noqa: PLC0415

        from executor.gpu.kernels.overlap import without_overlap  # noqa: PLC0415 - imports triton
        from executor.gpu.kernels.skinny import CUTS  # noqa: PLC0415

        def launch(case: tuple[int, int, int], cut: Cut, **how: Any) -> None:
            outputs, inputs, rows = case
            weight = torch.zeros(outputs, inputs, device=self._device, dtype=self._dtype)
            x = torch.zeros(rows, inputs, device=self._device, dtype=self._dtype)
            out = torch.empty(rows, outputs, device=self._device, dtype=self._dtype)
            norm = torch.ones_like(x[0]) if how.pop("normed", False) else None
            with contextlib.suppress(Exception):
                self._linears.launch(x, weight, None, out, cut=cut, norm=norm, epsilon=1e-6, **how)

        began_s = time.monotonic()
        work: list[Callable[[], None]] = []
        cuts = [(case, cut) for case, cut in CUTS.items() if cut is not None]
        for case, cut in cuts:
            if case[2] == 1:
                work.append(partial(launch, case, cut, **({"normed": True} if case[0] > case[1] else {"adds": True})))
        plain = [partial(launch, case, cut) for case, cut in cuts]
        with ThreadPoolExecutor(_COMPILERS) as threads:
            list(threads.map(lambda each: each(), work))
            if not _asked.brief:
                with without_overlap():
                    list(threads.map(lambda each: each(), work + plain))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {"s": round(time.monotonic() - began_s, 1)}

    def _task(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        if name in self._done or time.monotonic() > self._until_s:
            return
        self._notes.write(task=name, began=True)
        try:
            found = work()
        except Exception as error:
            found = {
                "problem": f"{type(error).__name__}: {str(error)[:300]}",
                "traceback": traceback.format_exc()[-800:],
            }
            if "CUDA error" in str(error) or "illegal" in str(error):
                self._notes.write(task=name, **found)
                raise SystemExit(75) from error  # the device is lost for this process
        self._done[name] = found
        self._notes.write(task=name, **found)

    def _matrix(self, outputs: int, inputs: int, rows: int) -> None:
        import torch  # noqa: PLC0415

        from executor.gpu.kernels.norm import add_rms_norm  # noqa: PLC0415 - imports triton
        from tests.gpu.check.timing import copies_beyond_cache, graph_s  # noqa: PLC0415

        device, dtype = self._device, self._dtype
        tried = candidates(outputs, inputs, rows, fake=self._fake)
        if self._done.keys() >= {_name(outputs, inputs, rows, place) for place in range(len(tried))}:
            return
        copies = 1 if self._fake else copies_beyond_cache(2 * outputs * inputs, most=48)
        weights = torch.empty(copies, outputs, inputs, device=device, dtype=dtype).normal_(0, 0.02)
        torch.manual_seed(0)
        x = torch.randn(rows, inputs, device=device).to(dtype)
        wanted = x.double() @ weights[0].double().t()

        def theirs(x: torch.Tensor) -> dict[str, Any]:
            out, residual, normed = (torch.zeros(len(x), outputs, device=device, dtype=dtype) for _ in range(3))

            def work(weight: torch.Tensor) -> None:
                torch.mm(x, weight.t(), out=out)
                if closes(outputs, inputs, rows, fake=self._fake):
                    add_rms_norm(out, residual, normed[0], 1e-6, out=normed)

            return {"us": _us(graph_s([partial(work, weight) for weight in weights], device))}

        def ours(cut: Cut, x: torch.Tensor) -> dict[str, Any]:
            work, seen = Product(self._linears, x, outputs, cut, fake=self._fake), []
            for _ in range(2):
                work.product.zero_()
                work(weights[0])
                seen.append(work.product.clone())
            error = _error(seen[0], wanted[: len(x)])
            told = {"cut": asdict(cut), "error": float(f"{error:.2g}")}
            if not error < WORST:
                return told | {"problem": f"its sums are wrong: off by {error:.2g} of the largest number"}
            if not torch.equal(*seen):
                return told | {"problem": "its sums are not the same twice"}
            return told | {"us": _us(graph_s([partial(work, weight) for weight in weights], device))}

        for place, cut in enumerate(tried):
            self._task(_name(outputs, inputs, rows, place), partial(ours, cut, x))
        fewer = [rows, *([8] if rows == 16 and not self._fake else [])]
        best = best_cuts(self._notes.read()).get((outputs, inputs, rows))
        for count in fewer:
            self._task(f"torch {outputs} {inputs} {count}", partial(theirs, x[:count]))
        if best is None:
            return
        from executor.gpu.kernels.skinny import Cut  # noqa: PLC0415

        if rows == 16 and not self._fake:
            self._task(f"few {outputs} {inputs} 8", partial(ours, Cut(**best["cut"]), x[:8].contiguous()))

    def _steps(self, shape: Shape) -> None:
        tasks = (
            [(1, *mode) for mode in _BRIEF]
            if self._fake
            else [(n, *mode) for n in ROWS for mode in _asked.modes if n == 1 or "fused" not in mode]
        )
        if self._done.keys() >= {f"step {shape.name} {rows} {which} {int(on)}" for rows, which, on in tasks}:
            return
        made: list[_Model] = []

        def make() -> dict[str, Any]:
            began_s = time.monotonic()
            made.append(_Model(shape, fake=self._fake, found=self._notes.read()))
            return {"s": round(time.monotonic() - began_s, 1)}

        self._done.pop(f"model {shape.name}", None)
        self._task(f"model {shape.name}", make)
        if made:
            for rows, which, on in tasks:
                self._task(f"step {shape.name} {rows} {which} {int(on)}", partial(made[0].timed, rows, which, on=on))


def _name(outputs: int, inputs: int, rows: int, place: int) -> str:
    return f"cut {outputs} {inputs} {rows} {place}"


class _Model:
    """One on the device, whose products are exchanged while it stands."""

    def __init__(self, shape: Shape, *, fake: bool, found: dict[str, dict[str, Any]] | None = None) -> None:
        import torch  # noqa: PLC0415

        from executor.gpu.kernels.skinny import SkinnyLinears  # noqa: PLC0415 - imports triton
        from executor.gpu.llama import GpuLlama, MatmulLinear  # noqa: PLC0415
        from executor.paged_model import probe_layers  # noqa: PLC0415
        from tests.gpu.check.layouts import random_cache  # noqa: PLC0415
        from tests.gpu.check.shapes import random_model  # noqa: PLC0415

        self._shape, self._fake = shape, fake
        self._device = torch.device("cpu") if fake else torch.device("cuda", 0)
        dtype = torch.float32 if fake else torch.bfloat16
        self._which = "ours"
        self._faster = faster(found or {})
        self._of_torch: dict[int, Any] = {}  # rows → logits
        if not fake:
            torch.cuda.empty_cache()
        loaded = random_model(shape, self._device, dtype)
        needs = probe_layers(loaded, shape.size.vocabulary)
        cache = random_cache(
            [need.shape for need in needs],
            num_blocks=8 if fake else max(ROWS) * (CONTEXT // 16 + 1),
            device=self._device,
            dtype=dtype,
        )
        linears = SkinnyLinears(self._device)
        self._model = GpuLlama(
            loaded,
            cache,
            needs,
            max_positions=4097,
            max_rows=max(ROWS),
            max_tokens=128,
            linear=lambda weight, bias: _Exchanged(
                self, weight, theirs=MatmulLinear(weight, bias), ours=linears.make(weight, bias)
            ),
        )

    def choose(self, outputs: int, inputs: int, rows: int) -> bool:
        """Whether it is our product's turn."""
        if self._which == "best":
            return (outputs, inputs, rows) in self._faster
        return self._which in {"ours", "fused"}

    def fuse(self, *, on: bool) -> None:
        """Let our products of one row do norms and additions, or not."""
        self._model._fuses_one = on  # set once in serving

    def step(self, rows: int) -> Callable[[], Any]:
        """Forward and sampling of `rows` rows; returns the logits and the tokens."""
        import torch  # noqa: PLC0415

        from executor.gpu.kernels.sampling import sample  # noqa: PLC0415 - imports triton
        from tests.gpu.check.layouts import HowSampled, layout  # noqa: PLC0415

        before = [(19 if self._fake else CONTEXT - 1, 1)] * rows
        torch.manual_seed(1)
        step = layout(
            before,
            self._device,
            vocab_size=self._shape.size.vocabulary,
            max_model_len=40 if self._fake else 4096,
            how=HowSampled(temperature=0.6),
        )
        tokens = torch.empty(rows, dtype=torch.int32, device=self._device)

        def work() -> Any:
            with torch.inference_mode():
                logits = self._model.forward(step.inputs, step.tables)
                sample(logits, step.inputs, step.tables, tokens)
            return logits, tokens

        return work

    def timed(self, rows: int, which: str, *, on: bool) -> dict[str, Any]:
        """Milliseconds of a step from a graph, whose results are those of kernels one after the other."""
        import torch  # noqa: PLC0415

        from executor.gpu.kernels.overlap import without_overlap  # noqa: PLC0415 - imports triton
        from tests.gpu.check.floors import step_floor  # noqa: PLC0415
        from tests.gpu.check.timing import capture, device_s, eager_s  # noqa: PLC0415

        self._which = which
        self.fuse(on=which == "fused")
        work = self.step(rows)
        with contextlib.nullcontext() if _asked.brief else without_overlap():
            wanted = [each.clone() for each in work()]  # launched so slowly that hardly anything overlaps
        of_torch = self._of_torch.setdefault(rows, wanted[0])  # torch's turn is the first
        with contextlib.nullcontext() if on else without_overlap():
            if self._fake:
                seconds, replay = eager_s(work, self._device), work
            else:
                work()
                replay = capture([work]).replay
                seconds = device_s(replay, self._device, rounds=15)
        seen = [wanted]
        got = self._model._logits[:rows]
        worst = 0.0
        for _ in range(3):
            got.fill_(torch.nan)
            replay()
            worst = max(worst, _error(got, seen[0][0]))
        floor = step_floor(self._shape, [(CONTEXT - 1, 1)] * rows, bytes_per_s=_BYTES_PER_S, flop_per_s=660e12)
        told: dict[str, Any] = {
            "ms": round(seconds * 1e3, 4),
            "over_floor": round(seconds * 1e3 / floor.ms, 3),
            "difference": float(f"{worst:.2g}"),
            "from_torch": float(f"{_error(wanted[0], of_torch):.2g}"),
        }
        if told["from_torch"] > _FROM_TORCH:
            told["problem"] = f"its logits are off by {told['from_torch']} from those with torch's products"
        if not worst < WORST:
            told["problem"] = f"its logits are off by {worst:.2g} from those of kernels one after the other"
        return told


class _Exchanged:
    """Torch's product or ours, whichever the model says."""

    own_rows = frozenset({1})

    def __init__(self, model: _Model, weight: Any, *, theirs: Any, ours: Any) -> None:
        self._model, self._theirs, self._ours = model, theirs, ours
        self._outputs, self._inputs = weight.shape

    def _now(self, rows: int) -> Any:
        return self._ours if self._model.choose(self._outputs, self._inputs, rows) else self._theirs

    def __call__(self, x: Any, out: Any) -> object:
        """As `executor.gpu.llama.Linear`."""
        return self._now(len(x))(x, out)

    def normed(self, x: Any, *given: Any, **how: Any) -> object:
        """As `executor.gpu.llama.Linear`."""
        return self._now(len(x)).normed(x, *given, **how)

    def fused(self, x: Any, out: Any, **how: Any) -> object:
        """As `executor.gpu.llama.Linear`."""
        return self._ours.fused(x, out, **how)

    def give_up(self, rows: int) -> None:
        """What is measured here stays as it is."""


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def _error(got: Any, wanted: Any) -> float:
    """The largest difference, as a share of the largest number; NaN counts as infinite."""
    error = float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    return error if error == error else float("inf")  # noqa: PLR0124 - NaN


# ---- what is told


def best_cuts(notes: dict[str, dict[str, Any]]) -> dict[tuple[int, int, int], dict[str, Any]]:
    """(outputs, inputs, padded rows) → the fastest."""
    best: dict[tuple[int, int, int], dict[str, Any]] = {}
    for task, found in notes.items():
        if task.startswith("cut ") and "us" in found and "problem" not in found:
            outputs, inputs, rows, _ = map(int, task.split()[1:])
            case = (outputs, inputs, rows)
            if case not in best or found["us"] < best[case]["us"]:
                best[case] = found
    return best


def faster(notes: dict[str, dict[str, Any]]) -> set[tuple[int, int, int]]:
    """(outputs, inputs, rows) where ours is faster than torch's."""
    ours = {case: found["us"] for case, found in best_cuts(notes).items()}
    for task, found in notes.items():
        if task.startswith("few ") and "us" in found:
            outputs, inputs, rows = map(int, task.split()[1:])
            ours[outputs, inputs, rows] = found["us"]
    return {
        case
        for case, us in ours.items()
        if us < notes.get("torch " + " ".join(map(str, case)), {}).get("us", float("inf"))
    }


def told(notes: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines for people, and the table to paste."""
    best, quicker = best_cuts(notes), faster(notes)
    for case, found in sorted(best.items()):
        outputs, inputs, rows = case
        theirs = notes.get(f"torch {outputs} {inputs} {rows}", {}).get("us", 0.0)
        share = 2 * outputs * inputs / _BYTES_PER_S / found["us"] * 1e6
        few = notes.get(f"few {outputs} {inputs} 8", {}).get("us") if rows == 16 else None
        yield (
            f"{outputs:>6} x {inputs:<5} {rows:>2} rows: {found['us']:7.2f} us, {share:4.0%} of the memory rate; "
            f"torch {theirs:7.2f}{' (faster)' if case not in quicker else ''}"
            f"{f'; 8 rows {few:.2f}' if few else ''}  {_short(found['cut'])}"
        )
    for task, found in notes.items():
        if task.startswith("step ") and "ms" in found:
            yield (
                f"{task}: {found['ms']} ms, {found['over_floor']} floors, differs by {found['difference']}, "
                f"from torch's by {found['from_torch']}"
            )
    problems = {task: found["problem"] for task, found in notes.items() if "problem" in found}
    for task, problem in problems.items():
        yield f"PROBLEM {task}: {problem} {_short(notes[task].get('cut', {}))}"
    yield "CUTS = {"
    for (outputs, inputs, rows), found in sorted(best.items()):
        cut = f"Cut({_short(found['cut'])})" if (outputs, inputs, rows) in quicker else None
        yield f"    ({outputs}, {inputs}, {rows}): {cut},"
    yield "}"


def _short(cut: dict[str, Any]) -> str:
    plain = {"splits": 1, "slices": 1, "held": False, "turned": False, "num_warps": 4, "num_stages": 4}
    return ", ".join(f"{name}={value}" for name, value in cut.items() if plain.get(name) != value)


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and do what the module says."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check.sweep")
    parser.add_argument("--out", type=Path, default=Path("sweep"))
    parser.add_argument("--budget", type=float, default=120, help="seconds")
    parser.add_argument("--device", choices=["cuda", "fake"], default="cuda")
    parser.add_argument("--only", choices=["cuts", "steps"], default="", help="what is measured; else both")
    parser.add_argument("--rows", default="", help="padded rows whose cuts are tried, as 1,16,64; else all")
    parser.add_argument("--brief", action="store_true", help="steps with overlap alone")
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    fake = asked.device == "fake"
    _asked.only, _asked.brief = asked.only, asked.brief
    _asked.rows = [int(rows) for rows in asked.rows.split(",") if rows] or _asked.rows
    if fake:
        os.environ["TRITON_INTERPRET"] = "1"
    if asked.compile:
        kind, first, second = asked.compile.split(":")
        if kind == "cuts":
            compile_cuts(int(first), int(second))
        else:
            compile_model(first, second == "1")
        return 0
    if asked.until:
        Measurer(asked.out, fake=fake, until_s=asked.until).run()
        return 0
    return _sweep(asked.out, asked.budget, fake=fake)


def _sweep(out: Path, budget_s: float, *, fake: bool) -> int:
    began_s = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    notes = Notes(out / "sweep.jsonl")

    def say(text: str) -> None:
        print(f"{time.monotonic() - began_s:5.0f} s  {text}", flush=True)

    if not fake:
        compile_all(out, _COMPILE_SHARE * budget_s, say)
    until_s = began_s + budget_s
    for _ in range(_LIVES):
        process = _start("--out", str(out), "--device", "fake" if fake else "cuda", "--until", str(until_s))
        try:
            code = process.wait(max(1.0, until_s + 10 - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            say("the process that measures was ended: the budget is used up")
            break
        if code == 0:
            break
        say(f"the process that measures ended with {code}; another one goes on")
    found = notes.read()
    (out / "sweep.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    lines = list(told(found))
    (out / "sweep.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    say(f"{len(found)} tasks, {sum('problem' in each for each in found.values())} with a problem")
    return 0 if any("us" in each for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
