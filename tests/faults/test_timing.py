"""The arithmetic behind the figures of timing.py."""

from __future__ import annotations

import numpy as np
import pytest

from tests.faults.timing import area, fitted_area


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    right, wrong = np.array([1.0, 2.0, 2.0]), np.array([2.0, 3.0])

    assert area(right, wrong) == pytest.approx((2 + 1.5 + 1.5) / 6)
    assert area(wrong, right) == pytest.approx(1 / 6)
    assert area(np.ones(4), np.ones(7)) == 0.5


def test_a_fit_finds_what_only_two_columns_together_tell() -> None:
    rng = np.random.default_rng(1)
    is_right = rng.random(2000) < 0.5
    noise = rng.normal(size=2000)
    rows = np.stack([noise + 0.3 * is_right, noise, np.zeros(2000)], axis=1)

    assert area(rows[is_right, 0], rows[~is_right, 0]) > 0.4
    assert fitted_area(rows, is_right) > 0.99


def test_a_fit_to_noise_tells_nothing() -> None:
    rng = np.random.default_rng(2)

    assert fitted_area(rng.normal(size=(5000, 7)), rng.random(5000) < 0.5) == pytest.approx(0.5, abs=0.03)
    assert fitted_area(np.zeros((10, 3)), rng.random(10) < 0.5) == 0.5
