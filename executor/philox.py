"""Philox4x32-10: a random number that is a pure function of a key and a counter (Salmon et al., SC 2011).

Nothing is carried from one draw to the next, so a token's random number depends on its seed, choice and output index,
and never on what else is in the batch or on how often the sequence was moved.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS: Final = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW: Final = np.uint64(0xFFFFFFFF)
_32: Final = np.uint64(32)
_ROUNDS: Final = 10


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return four words for each of N counters: counter (4, N), key (2, N), result (4, N), 32 bits in each number."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # 32 by 32 bits: 64 hold it
        c0, c1, c2, c3 = (product1 >> _32) ^ c1 ^ k0, product1 & _LOW, (product0 >> _32) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniforms(seeds: NDArray[np.uint64], choices: NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return one number in [0, 1) for each (seed, choice, output index); columns (N,). 53 random bits each."""
    zero = np.zeros(len(seeds), np.uint64)
    counter = np.stack([choices.astype(np.uint64) & _LOW, indices.astype(np.uint64) & _LOW, zero, zero])
    words = philox(counter, np.stack([seeds & _LOW, seeds >> _32]))
    bits = (words[0] << _32 | words[1]) >> np.uint64(11)
    fractions: NDArray[np.float64] = np.ldexp(bits.astype(np.float64), -53)
    return fractions
