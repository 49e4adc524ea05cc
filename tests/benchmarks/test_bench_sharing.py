"""The numbers of tests/benchmarks/RESULTS.md that can be counted by hand."""

from __future__ import annotations

from tests.benchmarks.bench_sharing import Used, measure


def test_choices_hold_their_prompt_once_and_copies_hold_it_each() -> None:
    """Prompt of 32, answer of 16, blocks of 4: the answer's last token is never stored."""
    assert measure("copies", 8, 32, 16, block_size=4) == Used(blocks=8 * 12, computed=8 * 47)
    assert measure("choices", 8, 32, 16, block_size=4).blocks == 7 + 8 * 5, "its last block is written by each"


def test_a_prompt_that_is_found_in_the_cache_is_shared_as_far_as_its_last_token_and_no_further() -> None:
    assert measure("cached", 8, 33, 15, block_size=4).blocks == measure("choices", 8, 33, 15, block_size=4).blocks
