"""Sampling on the device: the tokens of executor/sampler.py, for every control, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor import philox
from executor.gpu.inputs import DeviceTables, StepInputs
from executor.gpu.kernels.sampling import sample, uniforms
from executor.gpu.triton_case import is_interpreted
from executor.sampler import SamplingColumns, keep
from executor.sampler import sample as sample_on_host

# Enough for each path through the kernel; on a GPU, as it is in serving. No multiple of a chunk, or of a run.
NUM_ROWS, VOCAB_SIZE = (2, 4700) if is_interpreted() else (16, 151_900)
NOWHERE = 7  # what the token pool holds where nothing was written
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How one row is sampled."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 3
    choice: int = 0
    index: int = 0


class Device:
    """Tables for some rows, whose lines lie in another order than the rows, and one line that is nobody's."""

    def __init__(self, rows: list[Row], device: torch.device) -> None:
        self.rows = rows
        self.device = device
        lines = [*reversed(rows), Row(temperature=0.0)]
        self.slots = list(reversed(range(len(rows))))

        def floats(name: str) -> Tensor:
            return torch.tensor([getattr(line, name) for line in lines], dtype=torch.float32, device=device)

        def ints(name: str) -> Tensor:
            return torch.tensor([getattr(line, name) for line in lines], dtype=torch.int32, device=device)

        seeds = torch.from_numpy(np.array([line.seed for line in lines], np.uint64).view(np.int32).reshape(-1, 2))
        self.tables = DeviceTables(
            token_ids=torch.full((len(lines), 5), NOWHERE, dtype=torch.int32, device=device),
            block_tables=torch.zeros((len(lines), 1), dtype=torch.int32, device=device),
            temperature=floats("temperature"),
            top_k=ints("top_k"),
            top_p=floats("top_p"),
            min_p=floats("min_p"),
            seed=seeds.to(device),
            choice=ints("choice"),
        )

    def sample(self, logits: Tensor, *, padding: int = 0) -> list[int]:
        """Tokens of the rows, -1 where the row failed. Checks that the pool holds the same."""
        count = len(self.rows)
        slots = self.slots + [count] * padding
        places = [5 * slot + slot % 5 for slot in slots]
        nothing = torch.empty(0, dtype=torch.int32, device=self.device)
        inputs = StepInputs(
            num_decodes=0,
            max_query_len=0,
            max_seq_len=0,
            token_places=nothing,
            positions=nothing,
            slot_mapping=nothing,
            query_start_loc=nothing,
            seq_lens=nothing,
            table_rows=nothing,
            logits_indices=nothing,
            sampled_slots=torch.tensor(slots, dtype=torch.int32, device=self.device),
            sampled_places=torch.tensor(places, dtype=torch.int32, device=self.device),
            sampled_indices=torch.tensor(
                [row.index for row in self.rows] + [0] * padding, dtype=torch.int32, device=self.device
            ),
        )
        self.tables.token_ids.fill_(NOWHERE)
        out = torch.full((count + padding,), -2, dtype=torch.int32, device=self.device)

        sample(logits.to(self.device), inputs, self.tables, out)

        tokens: list[int] = out.tolist()[:count]
        pool = self.tables.token_ids[:count].flatten().tolist()
        for token, place in zip(tokens, places, strict=False):
            assert pool[place] == (token if token >= 0 else NOWHERE)
            pool[place] = NOWHERE
        assert set(pool) <= {NOWHERE}, "a token was written to a place of nobody"
        return tokens


def on_host(logits: Tensor, rows: list[Row]) -> list[int]:
    """What the sampler for the CPU chooses."""
    how = SamplingColumns(
        temperature=np.array([row.temperature for row in rows], np.float64),
        top_k=np.array([row.top_k for row in rows], np.int64),
        top_p=np.array([row.top_p for row in rows], np.float64),
        min_p=np.array([row.min_p for row in rows], np.float64),
        typical_p=np.ones(len(rows)),
        seed=np.array([row.seed for row in rows], np.uint64),
        choice=np.array([row.choice for row in rows], np.int64),
        index=np.array([row.index for row in rows], np.int64),
    )
    choice = sample_on_host(logits.float().numpy(), how)
    return [-1 if row in choice.failed else token for row, token in enumerate(choice.tokens)]


def assert_as_on_host(tokens: list[int], logits: Tensor, rows: list[Row]) -> None:
    """The same tokens, but where a draw falls so near to a border between two that sums round across it."""
    wanted = on_host(logits, rows)
    apart = [row for row, token in enumerate(tokens) if token != wanted[row]]
    for row in apart:
        assert is_next_to_the_draw(tokens[row], logits[row].float().numpy(), rows[row]), (row, tokens, wanted)
    assert 10 * len(apart) <= len(rows), (tokens, wanted)


def is_next_to_the_draw(token: int, logits: NDArray[np.float32], row: Row) -> bool:
    ids, weights = keep(
        logits, temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p
    )  # fmt: skip
    place = token if ids is None else int(np.searchsorted(ids, token))
    running = weights.cumsum(dtype=np.float64)
    seed, choice, index = np.array([row.seed], np.uint64), np.array([row.choice]), np.array([row.index])
    target = float(philox.uniforms(seed, choice, index)[0]) * running[-1]
    near = 1e-5 * running[-1]
    return bool(running[place] - weights[place] - near <= target <= running[place] + near and weights[place] > 0)


def noise(rows: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn((rows, vocab_size), generator=torch.Generator().manual_seed(seed)) * scale


def numbered(row: Row, count: int, *, seed: int = 3) -> list[Row]:
    """The same row at several output indices."""
    return [
        Row(
            temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p,
            seed=seed, choice=index % 3, index=index,
        )
        for index in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_greedy_row_takes_the_first_of_the_highest(dtype: torch.dtype, device: torch.device) -> None:
    logits = noise(8, 9000).to(dtype)  # in bfloat16 the highest value occurs more than once
    logits[0, [5000, 8999]] = 100.0
    logits[1, 8999] = 100.0
    logits[2, [0, 4096]] = 100.0
    rows = [Row(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1)] * 8

    tokens = Device(rows, device).sample(logits)

    assert tokens == on_host(logits, rows)
    assert tokens[:3] == [5000, 8999, 0]


CONTROLS = [
    Row(temperature=0.6),
    Row(temperature=2.5),
    Row(temperature=1e-3),
    Row(temperature=1e-35),
    Row(top_k=1),
    Row(temperature=1.3, top_k=50),
    Row(temperature=3.0, top_k=-(-VOCAB_SIZE // 128) + 1),  # more than there are runs
    Row(top_k=VOCAB_SIZE - 1),
    Row(top_k=VOCAB_SIZE + 1),
    Row(top_p=0.9),
    Row(temperature=2.5, top_p=0.999),
    Row(temperature=0.3, top_p=0.01),
    Row(top_p=1e-30),
    Row(min_p=0.05),
    Row(temperature=0.5, min_p=1.0),
    Row(top_k=40, top_p=0.95),
    Row(temperature=3.0, top_k=4000, top_p=0.8),
    Row(top_k=40, min_p=0.02),
    Row(top_p=0.9, min_p=0.02),
    Row(top_p=0.5, min_p=0.001),
    Row(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02),
    Row(temperature=1.5, top_k=300, top_p=0.7, min_p=0.2),
]
IN_FEWER_BITS = [  # where many logits are the same
    Row(temperature=0.6),
    Row(temperature=1.3, top_k=50),
    Row(top_p=0.9),
    Row(min_p=0.05),
    Row(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize(
    ("row", "dtype"),
    [*((row, torch.float32) for row in CONTROLS), *((row, torch.bfloat16) for row in IN_FEWER_BITS)],
    ids=str,
)
def test_every_control_leads_to_the_token_that_the_host_draws(
    row: Row, dtype: torch.dtype, device: torch.device
) -> None:
    rows = numbered(row, NUM_ROWS)
    logits = noise(NUM_ROWS, VOCAB_SIZE).to(dtype)

    assert_as_on_host(Device(rows, device).sample(logits), logits, rows)


@pytest.mark.parametrize("vocab_size", [1, 3, 128, 4096, 4097])
def test_no_size_of_the_vocabulary_is_special(vocab_size: int, device: torch.device) -> None:
    rows = [Row(temperature=0.0), Row(), Row(top_k=2), Row(top_p=0.8), Row(min_p=0.1), Row(top_k=100, top_p=0.99)]
    logits = noise(len(rows), vocab_size)

    assert Device(rows, device).sample(logits) == on_host(logits, rows)


@pytest.mark.parametrize("row", [Row(), Row(top_k=3), Row(top_p=0.5), Row(min_p=0.5), Row(top_k=9, top_p=0.7)], ids=str)
def test_tokens_that_are_taken_away_or_equal_are_treated_as_on_the_host(row: Row, device: torch.device) -> None:
    logits = torch.full((5, 5000), -INF)
    logits[0, 4321] = -3.0  # nothing else is left
    logits[1, 10:4990:166] = 1.0  # 30 equals
    logits[2, [7, 4097, 4999]] = torch.tensor([0.0, -0.0, -0.5])
    logits[3] = 0.25  # all equal
    logits[4, 4096:] = noise(1, 904)[0]  # a chunk that holds nothing
    rows = numbered(row, 5)

    assert Device(rows, device).sample(logits) == on_host(logits, rows)


@pytest.mark.parametrize("row", [Row(temperature=0.0), Row(), Row(top_k=3, top_p=0.9), Row(min_p=0.1)], ids=str)
def test_rows_that_are_not_finite_fail_and_leave_the_pool_as_it_is(row: Row, device: torch.device) -> None:
    logits = noise(6, 5000)
    logits[0, 4999] = NAN
    logits[1, 0] = INF
    logits[2] = -INF
    logits[3] = NAN
    logits[4, [3, 4500]] = torch.tensor([NAN, INF])
    rows = numbered(row, 6)

    tokens = Device(rows, device).sample(logits)

    assert tokens[:5] == [-1] * 5
    assert tokens[5:] == on_host(logits[5:], rows[5:])


def test_a_token_is_the_same_alone_and_in_a_crowd_with_padding(device: torch.device) -> None:
    rows = [Row(temperature=0.0), *(Row(top_k=k, top_p=p, index=9) for k in (0, 7) for p in (1.0, 0.6)), Row(min_p=0.3)]
    logits = noise(len(rows) + 3, 4500)

    crowd = Device(rows, device).sample(logits, padding=2)  # one row more: a position that is scored, not sampled

    assert crowd == [Device([row], device).sample(logits[i : i + 1])[0] for i, row in enumerate(rows)]


def test_rows_of_a_wider_tensor_are_read_where_they_lie(device: torch.device) -> None:
    rows = numbered(Row(top_p=0.9), 3)
    wide = torch.nn.functional.pad(noise(3, 700), (0, 68), value=NAN).to(device)

    assert Device(rows, device).sample(wide[:, :700]) == on_host(wide[:, :700].cpu(), rows)


def test_tokens_are_drawn_as_often_as_they_are_likely(device: torch.device) -> None:
    values = torch.tensor([0.3, -1.0, 2.0, 0.1, -INF, 1.2, 0.9, -0.4])
    likely = (values / 0.7).softmax(0)
    count = 60 if is_interpreted() else 5000

    tokens = torch.tensor(
        Device([Row(temperature=0.7, seed=11, index=index) for index in range(count)], device).sample(
            values.repeat(count, 1)
        )
    )

    found = torch.bincount(tokens, minlength=8)
    assert found[4] == 0
    chi_square = ((found - count * likely) ** 2 / (count * likely))[likely > 0].sum()
    assert chi_square < 22.5  # with 6 degrees of freedom, one in a thousand is more than this


def test_uniform_numbers_are_those_of_the_host_bit_for_bit(device: torch.device) -> None:
    draw = np.random.default_rng(0)
    seeds = np.append(draw.integers(0, 2**64, 298, np.uint64), np.array([0, 2**64 - 1], np.uint64))
    choices, indices = draw.integers(0, 2**31, 300), draw.integers(0, 2**31, 300)

    found = uniforms(
        torch.from_numpy(seeds.view(np.int32).reshape(-1, 2)).to(device),
        torch.from_numpy(choices.astype(np.int32)).to(device),
        torch.from_numpy(indices.astype(np.int32)).to(device),
    )

    assert found.cpu().numpy().tobytes() == philox.uniforms(seeds, choices, indices).tobytes()
