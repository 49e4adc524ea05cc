"""The contract of paged attention: every backend, every shape, against one token's attention written out by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from common.errors import ModelFolderError
from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, slot_ref
from executor.attention import BACKENDS, choose
from executor.attention.native import NativeAttention
from executor.attention.protocol import AttentionBackend, AttentionStep, LayerNeeds, LayerOptions
from executor.attention.triton import TritonAttention
from executor.batch import InputBatch, build_batch
from executor.kv_cache import KvCache, LayerCache, LayerShape, SlabFormat
from executor.native.library import native
from executor.resident import Resident

CPU = torch.device("cpu")
PLAIN = LayerNeeds(
    shape=LayerShape(num_heads=4, num_kv_heads=2, key_dim=8, value_dim=8), dtype=torch.float32, device=CPU
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step: each row is (tokens computed before, tokens computed now). Row r may share blocks with row 0."""

    rows: tuple[tuple[int, int], ...]
    block_size: int = 16
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    value_dim: int | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    shared_blocks: int = 0  # first blocks that every row has in common
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None  # as dtype unless said


LONG = Case(rows=(), num_kv_heads=1, group=3, window=None)
CASES = {
    "one token alone": Case(rows=((0, 1),)),
    "a decode batch around page borders": Case(rows=((14, 1), (15, 1), (16, 1), (17, 1), (31, 1), (32, 1))),
    "a decode batch of very different lengths": Case(rows=((0, 1), (200, 1), (1, 1), (90, 1), (70, 1), (100, 1))),
    "whole prompts": Case(rows=((0, 5), (0, 16), (0, 17), (0, 40))),
    "chunks, prompts and decodes mixed": Case(rows=((20, 7), (33, 1), (0, 9), (16, 16), (5, 1), (15, 2))),
    "a prefix that another row writes in this step": Case(rows=((0, 40), (32, 5), (32, 1)), shared_blocks=2),
    "decodes that share a prompt": Case(
        rows=((300, 1), (290, 1), (288, 1), (0, 300), (511, 1), (287, 1)), shared_blocks=17
    ),
    "choices of one request": Case(
        rows=tuple((256 + n, 1) for n in range(9)), shared_blocks=16, group=3, sinks=True, dtype=torch.bfloat16
    ),
    "a prompt in large pages": Case(rows=((383, 1), (384, 1), (500, 1)), block_size=256, shared_blocks=1, group=1),
    "small pages": Case(rows=((3, 1), (7, 9), (0, 6)), block_size=4),
    "large pages": Case(rows=((300, 1), (10, 30), (255, 1), (256, 1)), block_size=256),
    "a group of 1": Case(rows=((20, 3), (18, 1)), group=1),
    "a group of 3": Case(rows=((20, 3), (18, 1)), group=3),
    "a group of 4": Case(rows=((20, 3), (18, 1)), group=4),
    "a group of 8": Case(rows=((20, 3), (18, 1)), group=8),
    "one KV head": Case(rows=((20, 3), (18, 1)), num_kv_heads=1, group=7),
    "head dimension 80": Case(rows=((20, 3), (18, 1)), head_dim=80),
    "head dimension 128": Case(rows=((20, 3), (18, 1)), head_dim=128),
    "values narrower than keys": Case(rows=((20, 3), (18, 1), (0, 5)), head_dim=96, value_dim=64),
    "a window shorter than a page": Case(rows=((40, 3), (38, 1), (0, 20), (2, 1)), window=5),
    "a window of one": Case(rows=((40, 3), (38, 1), (0, 4)), window=1),
    "a window over several pages": Case(rows=((90, 3), (88, 1), (64, 1), (20, 1), (0, 60)), window=40),
    "a window longer than everything": Case(rows=((9, 3), (8, 1), (0, 6)), window=1000),
    "a soft cap": Case(rows=((20, 3), (18, 1), (0, 6)), softcap=2.0),
    "a soft cap in a window": Case(rows=((20, 3), (18, 1), (0, 6)), softcap=2.0, window=7),
    "sinks": Case(rows=((20, 3), (18, 1), (0, 6)), sinks=True),
    "sinks in a window": Case(rows=((20, 3), (18, 1), (0, 6)), sinks=True, window=7),
    "float64": Case(rows=((20, 3), (18, 1), (0, 6)), dtype=torch.float64),
    "bfloat16": Case(rows=((20, 3), (18, 1), (0, 6), (60, 1)), dtype=torch.bfloat16),
    "bfloat16 in a window": Case(rows=((200, 3), (180, 1), (0, 60)), dtype=torch.bfloat16, window=33),
    "bfloat16 over long rows": Case(rows=((700, 1), (500, 30), (129, 1), (0, 300)), dtype=torch.bfloat16, group=3),
    "float32 over long rows": Case(rows=((700, 1), (500, 30), (129, 1), (0, 300)), group=3),
    "large pages in bfloat16": Case(rows=((300, 1), (10, 30), (255, 1)), block_size=256, dtype=torch.bfloat16),
    "a large group": Case(rows=((300, 1), (20, 3), (0, 9)), num_kv_heads=1, group=29),
    "int8 K and V": Case(rows=((200, 3), (18, 1), (0, 60)), dtype=torch.bfloat16, kv_dtype=torch.int8),
    "int8 K and V for float32": Case(rows=((20, 3), (140, 1), (0, 6)), kv_dtype=torch.int8, head_dim=80, sinks=True),
    "256 rows": Case(rows=tuple((n, 1) for n in range(256)), num_kv_heads=1, group=1, head_dim=16),
}
# tests/gpu has what they are about, in smaller steps
TOO_LONG_TO_INTERPRET = {"256 rows", "decodes that share a prompt", "choices of one request", "bfloat16 over long rows"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.int8: 4e-2}


@dataclass(frozen=True, kw_only=True)
class Path:
    """A backend, and for the native one the instruction set it is made to use."""

    backend: AttentionBackend
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.backend.name} {self.isa}" if self.isa else self.backend.name


def paths() -> list[Path]:
    found = [Path(backend=backend) for backend in BACKENDS if not backend.packed and backend.name != "triton"]
    if importlib.util.find_spec("triton") is not None:
        found.append(Path(backend=TritonAttention(interpreted=not torch.cuda.is_available())))
    sets = ("baseline", "avx2", "avx512", "amx")
    return found + [Path(backend=NativeAttention(), isa=isa) for isa in sets[: sets.index(BEST_ISA) + 1]]


def device_of(backend: AttentionBackend) -> torch.device:
    """Where it is tested: those for a GPU on one, if there is one, and all others on the CPU."""
    for_gpu = backend.name in ("triton", "flashinfer")
    return torch.device("cuda") if for_gpu and torch.cuda.is_available() else CPU


BEST_ISA = native().isa


class Slots:
    """One token's place in a slab, for reading and writing, in either format (executor/native/csrc/types.h)."""

    def __init__(self, cache: LayerCache, *, values: bool, dim: int) -> None:
        self.slab = cache.values if values else cache.keys
        self.cache, self.values, self.dim = cache, values, dim
        self.lanes = 1 if cache.format.dtype is torch.float32 else 2

    def at(self, block: int, offset: int) -> Tensor:
        """A view of the numbers of one token, of as many axes as it takes."""
        if not self.cache.format.packed:
            return self.slab[block, :, offset]
        size, dtype = self.cache.block_size, self.cache.format.dtype
        numbers = self.slab[block][:, : size * self.dim * dtype.itemsize].view(dtype)
        group, lane = divmod(offset, 16)
        if self.values:
            shape = (-1, size // 16, 16 // self.lanes, self.dim, self.lanes)
            return numbers.view(shape)[:, group, lane // self.lanes, :, lane % self.lanes]
        return numbers.view(-1, size // 16, self.dim // self.lanes, 16, self.lanes)[:, group, :, lane]

    def scales(self, block: int, offset: int) -> Tensor:
        """(heads,) float32, of int8."""
        return self.slab[block][:, self.cache.block_size * self.dim :].view(torch.float32)[:, offset]

    def write(self, block: int, offset: int, numbers: Tensor) -> None:
        place = self.at(block, offset)
        if self.cache.format.dtype is torch.int8:
            numbers = numbers.float()  # the quotient may not round to 128
            scale = numbers.abs().amax(dim=1) / 127
            self.scales(block, offset).copy_(scale)
            numbers = (numbers / scale[:, None]).round()
        place.copy_(numbers.reshape(place.shape))


def needs_of(case: Case, device: torch.device = CPU) -> LayerNeeds:
    return LayerNeeds(
        shape=LayerShape(
            num_heads=case.num_kv_heads * case.group,
            num_kv_heads=case.num_kv_heads,
            key_dim=case.head_dim,
            value_dim=case.value_dim or case.head_dim,
        ),
        dtype=case.dtype,
        device=device,
        window=case.window,
        softcap=case.softcap,
        sinks=case.sinks,
        block_size=case.block_size,
    )


class Scene:
    """A step over a slab in which everything is NaN but the tokens that rows have computed."""

    def __init__(self, case: Case, backend: AttentionBackend, seed: int = 0) -> None:
        self.case = case
        self.backend = backend
        self.device = device_of(backend)
        random = torch.Generator().manual_seed(seed)
        each = [-(-(before + now) // case.block_size) for before, now in case.rows]
        num_blocks = sum(each) + 3
        names = torch.randperm(num_blocks, generator=random).tolist()
        shared, names = names[: case.shared_blocks], names[case.shared_blocks :]
        self.resident = Resident(
            num_blocks=num_blocks,
            block_size=case.block_size,
            max_sequences=len(case.rows),
            max_step_tokens=1 << 20,
            max_model_len=max(before + now for before, now in case.rows) + 1,
            vocab_size=2,
        )
        new = []
        for row, (before, now) in enumerate(case.rows):
            own, names = names[: each[row] - len(shared)], names[each[row] - len(shared) :]
            new.append(admission(row, before, now, [*shared, *own]))
        plan = StepPlan(step=0, refs=[s.ref for s in new], num_scheduled=[now for _, now in case.rows], new=new)
        self.batch: InputBatch = build_batch(self.resident, self.resident.apply(plan))

        shape = needs_of(case).shape
        dims = (shape.key_dim, shape.value_dim)
        self.needs = needs_of(case, self.device)
        self.options = LayerOptions(
            scale=0.3,
            window=case.window,
            softcap=case.softcap,
            sinks=torch.randn(shape.num_heads, generator=random).to(self.device) if case.sinks else None,
        )
        slab = SlabFormat(dtype=case.kv_dtype or case.dtype, packed=backend.packed)
        cache = KvCache([shape], num_blocks=num_blocks, block_size=case.block_size, format=slab, device=self.device)
        self.cache: LayerCache = cache.layers[0]
        for which in (self.cache.keys, self.cache.values):
            which.fill_(255 if backend.packed else torch.nan)  # all bits set is NaN too
        self.slots = [Slots(self.cache, values=values, dim=dims[values]) for values in (False, True)]

        def noise(*size: int) -> Tensor:
            return torch.randn(size, generator=random, dtype=torch.float64).to(case.dtype)

        longest = max(before + now for before, now in case.rows)
        common = len(shared) * case.block_size
        heads = case.num_kv_heads
        base = [noise(longest, heads, dim) for dim in dims]
        self.past: list[tuple[Tensor, Tensor]] = []  # K and V of every position of each row
        for row, (before, now) in enumerate(case.rows):
            tensors = [noise(before + now, heads, dim) for dim in dims]
            for mine, everyones in zip(tensors, base, strict=True):
                count = min(common, before + now)
                mine[:count] = everyones[:count]
            self.past.append((tensors[0], tensors[1]))
            self._write(row, common if row else 0, before)  # what is shared is written by row 0 alone
        self.query = noise(len(self.batch.positions), shape.num_heads, shape.key_dim)

    def _write(self, row: int, first: int, before: int) -> None:
        for position in range(first, before):
            block = int(self.resident.block_tables[row, position // self.case.block_size])
            for slots, known in zip(self.slots, self.past[row], strict=True):
                slots.write(block, position % self.case.block_size, known[position])

    def refill(self) -> None:
        """Write the history anew, after `past` was changed."""
        for row, (before, _) in enumerate(self.case.rows):
            self._write(row, 0, before)

    def tokens(self) -> list[tuple[int, int]]:
        """Row (in the order of the case) and position of each token of the batch."""
        slots, positions = self.batch.token_places // self.resident.max_model_len, self.batch.positions
        return list(zip(slots.tolist(), positions.tolist(), strict=True))

    def attend(self) -> Tensor:
        new = [torch.stack([self.past[row][which][position] for row, position in self.tokens()]) for which in (0, 1)]
        # as a projection leaves them: heads before tokens in memory, so not contiguous
        tensors = (t.to(self.device) for t in (self.query, *new))
        query, key, value = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors)
        step = AttentionStep.of(self.batch, self.device)
        return self.backend.attend(query, key, value, self.cache, step, self.options).cpu()

    def expected(self) -> Tensor:
        out = []
        for index, (row, position) in enumerate(self.tokens()):
            first = 0 if self.case.window is None else max(0, position + 1 - self.case.window)
            keys, values = (t[first : position + 1].double() for t in self.past[row])
            heads = []
            for head in range(self.query.shape[1]):
                kv_head = head // self.case.group
                scores = keys[:, kv_head] @ self.query[index, head].double() * self.options.scale
                if self.case.softcap is not None:
                    scores = self.case.softcap * torch.tanh(scores / self.case.softcap)
                weights = scores.exp()
                total = weights.sum()
                if self.options.sinks is not None:
                    total = total + self.options.sinks[head].double().cpu().exp()
                heads.append(weights @ values[:, kv_head] / total)
            out.append(torch.stack(heads))
        return torch.stack(out)


def admission(row: int, before: int, now: int, blocks: list[int]) -> NewSequence:
    return NewSequence(
        ref=slot_ref(row, 0),
        attempt=0,
        token_ids=[0] * (before + now),
        num_prompt=before + now,
        num_computed=before,
        block_table=[BlockId(block) for block in blocks],
        sampling=SamplingParams(),
        choice=0,
        max_tokens=5,
        stop_token_ids=(),
    )


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[AttentionBackend]:
    path: Path = request.param
    native().use_isa(path.isa or BEST_ISA)
    yield path.backend
    native().use_isa(BEST_ISA)


every_path = pytest.mark.parametrize("backend", paths(), ids=str, indirect=True)


@pytest.mark.parametrize("name", CASES)
@every_path
def test_every_backend_agrees_with_attention_by_hand(backend: AttentionBackend, name: str) -> None:
    case = CASES[name]
    reason = backend.why_not(needs_of(case, device_of(backend))) or (
        "int8 K and V" if case.kv_dtype and not backend.packed else None
    )
    if backend.name == "triton" and device_of(backend) == CPU and name in TOO_LONG_TO_INTERPRET:
        reason = "takes the interpreter many seconds"
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    scene = Scene(case, backend)

    out = scene.attend()

    assert out.shape == (len(scene.query), scene.needs.shape.num_heads, scene.needs.shape.value_dim)
    tolerance = TOLERANCE[case.kv_dtype or case.dtype]
    torch.testing.assert_close(out.double(), scene.expected(), rtol=tolerance, atol=tolerance)


@every_path
def test_only_the_slots_of_the_step_are_written(backend: AttentionBackend) -> None:
    scene = Scene(CASES["chunks, prompts and decodes mixed"], backend)
    everywhere = [divmod(slot, 16) for slot in range(len(scene.cache.keys) * 16)]
    before = [[slots.at(*place).clone() for place in everywhere] for slots in scene.slots]

    scene.attend()

    for slots, was in zip(scene.slots, before, strict=True):
        same = [
            torch.equal(slots.at(*place).nan_to_num(7.5), old.nan_to_num(7.5))
            for place, old in zip(everywhere, was, strict=True)
        ]
        assert [n for n, each in enumerate(same) if not each] == sorted(scene.batch.slot_mapping.tolist())


@pytest.mark.parametrize("isa", [path.isa for path in paths() if path.isa])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_is_the_same_bit_for_bit_alone_in_a_crowd_and_in_chunks(isa: str, dtype: torch.dtype) -> None:
    native().use_isa(isa)
    try:
        # row 0 ends at position 299 in all three: decoded in a crowd, at the end of a chunk, and by one thread
        crowd = Scene(replace(LONG, rows=((299, 1), (20, 1), (0, 40)), dtype=dtype), NativeAttention())
        chunk = Scene(replace(LONG, rows=((250, 50), (20, 1), (0, 40)), dtype=dtype), NativeAttention())
        chunk.past, chunk.query = crowd.past, torch.cat([crowd.query[1:2], *[crowd.query[:1]] * 50, crowd.query[2:]])
        chunk.refill()
        last = chunk.tokens().index((0, 299))
        chunk.query[last] = crowd.query[crowd.tokens().index((0, 299))]
        wanted = crowd.attend()[crowd.tokens().index((0, 299))]

        found = chunk.attend()[last]
        native().use_threads(1)
        alone = crowd.attend()[crowd.tokens().index((0, 299))]
    finally:
        native().use_threads(torch.get_num_threads())
        native().use_isa(BEST_ISA)

    assert torch.equal(found, wanted)
    assert torch.equal(alone, wanted)


@pytest.mark.parametrize("isa", [path.isa for path in paths() if path.isa])
@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shared_blocks", [8, 17, 25])
def test_rows_that_read_a_common_prefix_once_get_the_bits_that_they_get_apart(
    isa: str, kv: torch.dtype, shared_blocks: int
) -> None:
    native().use_isa(isa)
    dtype = torch.float32 if kv is torch.float32 else torch.bfloat16
    # one row's end is that of the prefix, and one is in the middle of a prompt: it shares nothing
    before = [17 * 16, 17 * 16 + 3, 25 * 16 - 1, 25 * 16, 25 * 16 + 1, 600, 601]
    rows = (*((n, 1) for n in before if n >= shared_blocks * 16 - 1), (shared_blocks * 16, 5))
    case = replace(LONG, rows=rows, shared_blocks=shared_blocks, dtype=dtype, kv_dtype=kv)
    together, apart = Scene(case, NativeAttention()), Scene(replace(case, shared_blocks=0), NativeAttention())
    apart.past, apart.query = together.past, together.query
    apart.refill()

    assert torch.equal(together.attend(), apart.attend())
    native().use_isa(BEST_ISA)


def test_the_first_backend_that_serves_a_layer_is_chosen_for_it() -> None:
    layers = [PLAIN, replace(PLAIN, sinks=True)]
    lanes = [replace(each, shape=replace(PLAIN.shape, key_dim=16, value_dim=16)) for each in layers]

    assert [b.name for b in choose(layers)] == ["torch", "reference"]
    assert [b.name for b in choose(layers, "reference")] == ["reference"] * 2
    assert [b.name for b in choose(lanes)] == ["native"] * 2


def test_packed_layers_are_all_or_none() -> None:
    lanes = replace(PLAIN, shape=replace(PLAIN.shape, key_dim=16, value_dim=16))

    assert [b.name for b in choose([lanes, PLAIN])] == ["torch"] * 2


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_rows_of_8_bits_are_for_triton_alone(backend: str) -> None:
    lanes = replace(PLAIN, shape=replace(PLAIN.shape, key_dim=16, value_dim=16), kv_dtype=torch.float8_e4m3fn)

    with pytest.raises(ModelFolderError, match=f"{backend}: K and V in torch.float8_e4m3fn"):
        choose([lanes], backend)


@pytest.mark.parametrize(
    ("wanted", "says"), [("torch", "layer 0: torch: soft cap"), ("fast", "there are: auto, triton, native, torch")]
)
def test_a_backend_that_cannot_serve_is_refused_with_the_reason(wanted: str, says: str) -> None:
    with pytest.raises(ModelFolderError, match=says):
        choose([replace(PLAIN, softcap=30.0)], wanted)
