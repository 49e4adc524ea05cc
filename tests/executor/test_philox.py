"""The random numbers are those that everybody's Philox gives."""

from __future__ import annotations

import numpy as np
import pytest

from executor.philox import philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known-answer vectors that the Random123 library publishes for philox4x32, 10 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
        return np.array([[int(word, 16)] for word in text.split()], np.uint64)

    assert philox(words(counter), words(key)).tolist() == words(expected).tolist()


def draw(seed: int, choice: int, index: int) -> float:
    return float(uniforms(np.array([seed], np.uint64), np.array([choice]), np.array([index]))[0])


def test_every_bit_of_seed_choice_and_index_changes_the_draw() -> None:
    keys = [(0, 0, 0), *((1 << bit, 0, 0) for bit in range(64)), *((0, 1 << bit, 0) for bit in range(31))]
    keys += [(0, 0, 1 << bit) for bit in range(31)]

    assert len({draw(*key) for key in keys}) == len(keys)


def test_draws_fill_the_unit_interval_evenly() -> None:
    count = 100_000
    draws = uniforms(np.full(count, 7, np.uint64), np.zeros(count, np.int64), np.arange(count))

    assert draws.min() >= 0
    assert draws.max() < 1
    observed = np.histogram(draws, bins=100, range=(0, 1))[0]
    chi_square = float(((observed - count / 100) ** 2 / (count / 100)).sum())
    assert 60 < chi_square < 150  # 99 degrees of freedom: 99.9% lie in this range; the draws are fixed
