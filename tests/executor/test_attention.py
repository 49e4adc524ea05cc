"""The contract of paged attention: every backend, every shape, against one token's attention written out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from common.errors import ModelFolderError
from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, slot_ref
from executor.attention import BACKENDS, choose
from executor.attention.protocol import AttentionBackend, AttentionStep, LayerNeeds, LayerOptions
from executor.batch import InputBatch, build_batch
from executor.kv_cache import KvCache, LayerCache, LayerShape
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


CASES = {
    "one token alone": Case(rows=((0, 1),)),
    "a decode batch around page borders": Case(rows=((14, 1), (15, 1), (16, 1), (17, 1), (31, 1), (32, 1))),
    "a decode batch of very different lengths": Case(rows=((0, 1), (200, 1), (1, 1), (90, 1), (70, 1), (100, 1))),
    "whole prompts": Case(rows=((0, 5), (0, 16), (0, 17), (0, 40))),
    "chunks, prompts and decodes mixed": Case(rows=((20, 7), (33, 1), (0, 9), (16, 16), (5, 1), (15, 2))),
    "a prefix that another row writes in this step": Case(rows=((0, 40), (32, 5), (32, 1)), shared_blocks=2),
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
    "256 rows": Case(rows=tuple((n, 1) for n in range(256)), num_kv_heads=1, group=1, head_dim=16),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Scene:
    """A step over a slab in which everything is NaN but the tokens that rows have computed."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
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

        shape = LayerShape(
            num_heads=case.num_kv_heads * case.group,
            num_kv_heads=case.num_kv_heads,
            key_dim=case.head_dim,
            value_dim=case.value_dim or case.head_dim,
        )
        self.needs = LayerNeeds(
            shape=shape, dtype=case.dtype, device=CPU, window=case.window, softcap=case.softcap, sinks=case.sinks
        )
        self.options = LayerOptions(
            scale=0.3,
            window=case.window,
            softcap=case.softcap,
            sinks=torch.randn(shape.num_heads, generator=random) if case.sinks else None,
        )
        cache = KvCache([shape], num_blocks=num_blocks, block_size=case.block_size, dtype=case.dtype, device=CPU)
        self.cache: LayerCache = cache.layers[0]
        self.cache.keys.fill_(torch.nan)
        self.cache.values.fill_(torch.nan)

        def noise(*size: int) -> Tensor:
            return torch.randn(size, generator=random, dtype=torch.float64).to(case.dtype)

        longest = max(before + now for before, now in case.rows)
        common = len(shared) * case.block_size
        heads, dims = case.num_kv_heads, (shape.key_dim, shape.value_dim)
        base = [noise(longest, heads, dim) for dim in dims]
        self.past: list[tuple[Tensor, Tensor]] = []  # K and V of every position of each row
        for row, (before, now) in enumerate(case.rows):
            tensors = [noise(before + now, heads, dim) for dim in dims]
            for mine, everyones in zip(tensors, base, strict=True):
                count = min(common, before + now)
                mine[:count] = everyones[:count]
            self.past.append((tensors[0], tensors[1]))
            if row == 0 or not shared:  # what is shared is written by row 0 alone
                self._write(row, before)
        self.query = noise(len(self.batch.positions), shape.num_heads, shape.key_dim)

    def _write(self, row: int, before: int) -> None:
        for position in range(before):
            block = self.resident.block_tables[row, position // self.case.block_size]
            for slab, known in zip((self.cache.keys, self.cache.values), self.past[row], strict=True):
                slab[block, :, position % self.case.block_size] = known[position]

    def tokens(self) -> list[tuple[int, int]]:
        """Row (in the order of the case) and position of each token of the batch."""
        slots, positions = self.batch.token_places // self.resident.max_model_len, self.batch.positions
        return list(zip(slots.tolist(), positions.tolist(), strict=True))

    def attend(self, backend: AttentionBackend) -> Tensor:
        new = [torch.stack([self.past[row][which][position] for row, position in self.tokens()]) for which in (0, 1)]
        # as a projection leaves them: heads before tokens in memory, so not contiguous
        query, key, value = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (self.query, *new))
        return backend.attend(query, key, value, self.cache, AttentionStep.of(self.batch, CPU), self.options)

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
                    total = total + self.options.sinks[head].double().exp()
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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_every_backend_agrees_with_attention_by_hand(backend: AttentionBackend, name: str) -> None:
    scene = Scene(CASES[name])
    reason = backend.why_not(scene.needs)
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")

    out = scene.attend(backend)

    assert out.shape == (len(scene.query), scene.needs.shape.num_heads, scene.needs.shape.value_dim)
    tolerance = TOLERANCE[scene.case.dtype]
    torch.testing.assert_close(out.double(), scene.expected(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_only_the_slots_of_the_step_are_written(backend: AttentionBackend) -> None:
    scene = Scene(CASES["chunks, prompts and decodes mixed"])
    before = scene.cache.keys.clone()

    scene.attend(backend)

    changed = ~torch.isclose(before, scene.cache.keys, equal_nan=True).all(dim=3).all(dim=1)  # (blocks, offsets)
    assert sorted(changed.view(-1).nonzero().view(-1).tolist()) == sorted(scene.batch.slot_mapping.tolist())


def test_the_first_backend_that_serves_a_layer_is_chosen_for_it() -> None:
    layers = [PLAIN, replace(PLAIN, sinks=True)]

    assert [b.name for b in choose(layers)] == ["torch", "reference"]
    assert [b.name for b in choose(layers, "reference")] == ["reference"] * 2


@pytest.mark.parametrize(
    ("wanted", "says"), [("torch", "layer 0: torch: soft cap"), ("fast", "there are: auto, torch")]
)
def test_a_backend_that_cannot_serve_is_refused_with_the_reason(wanted: str, says: str) -> None:
    with pytest.raises(ModelFolderError, match=says):
        choose([replace(PLAIN, softcap=30.0)], wanted)
