"""Near-duplicates equal those of a comparison of all pairs, and many equal clips take no more time than other ones."""

from __future__ import annotations

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline import duplicates
from data_pipeline.duplicates import near_duplicates

Hashes = NDArray[np.uint8]


def reference(hashes: Hashes, bits: int) -> list[int]:
    """Row by row, each with all that are kept."""
    unpacked = np.unpackbits(hashes, axis=1)
    of: list[int] = []
    for row, own in enumerate(unpacked):
        kept = [earlier for earlier in range(row) if of[earlier] < 0]
        near = [earlier for earlier in kept if np.count_nonzero(unpacked[earlier] != own) <= bits]
        of.append(near[0] if near else -1)
    return of


def flipped(random: np.random.Generator, hashes: Hashes, most: int) -> Hashes:
    """Each hash with 0 to `most` of its bits turned over."""
    count = random.integers(0, most + 1, len(hashes))
    rank = random.random((len(hashes), 192)).argsort(axis=1).argsort(axis=1)
    return np.packbits(np.unpackbits(hashes, axis=1) ^ (rank < count[:, None]), axis=1)


def planted(random: np.random.Generator, rows: int, most: int) -> Hashes:
    """Random hashes, two thirds of them neighbours, and neighbours of neighbours, of others; shuffled."""
    hashes = random.integers(0, 256, (rows // 3, 24), dtype=np.uint8)
    near = flipped(random, hashes, most)
    return random.permutation(np.concatenate([hashes, near, flipped(random, near, most)]))


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 8, 16, 24])
def test_it_equals_the_comparison_of_all_pairs(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "FEW_ROWS", 10)
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", 50)
    hashes = planted(np.random.default_rng(bits), 600, bits + 2)
    expected = reference(hashes, bits)
    assert near_duplicates(hashes, bits).tolist() == expected
    assert 0 < sum(of >= 0 for of in expected) < 600


def test_a_neighbour_of_a_dropped_row_is_kept() -> None:
    hashes = np.zeros((4, 24), np.uint8)
    hashes[1, 0], hashes[2, 0], hashes[3, 0] = 0b00000111, 0b00111111, 0b11111111
    assert near_duplicates(hashes, 3).tolist() == [-1, 0, -1, 2]
    assert near_duplicates(hashes[::-1], 3).tolist() == [-1, 0, -1, 2]
    assert near_duplicates(hashes, 2).tolist() == [-1, -1, -1, 2]


def test_of_two_kept_neighbours_the_first_is_named() -> None:
    hashes = np.zeros((3, 24), np.uint8)
    hashes[1, 0], hashes[2, 0] = 0b1111, 0b0011
    assert near_duplicates(hashes, 2).tolist() == [-1, -1, 0]


def test_of_equal_rows_the_first_is_kept() -> None:
    hashes = np.repeat(np.arange(3, dtype=np.uint8)[:, None] * 85, 24, axis=1)[[0, 1, 0, 2, 1, 0]]
    for bits in (0, 8):
        assert near_duplicates(hashes, bits).tolist() == [-1, -1, 0, -1, 1, 0]


@pytest.mark.parametrize("most", [0, 4])
def test_many_clips_that_are_all_alike_take_no_quadratic_time(most: int) -> None:
    random = np.random.default_rng(0)
    alike = flipped(random, np.zeros((50_000, 24), np.uint8), most)
    hashes = np.concatenate([random.integers(0, 256, (5_000, 24), dtype=np.uint8), alike])
    begin = time.process_time()
    of = near_duplicates(hashes, 8)
    assert time.process_time() - begin < 5  # all pairs: 1.25 billion
    assert (of[:5_000] == -1).all()
    assert of[5_000] == -1 and (of[5_001:] == 5_000).mean() > 0.9
    assert np.array_equal(of, near_duplicates(hashes, 8))


def test_none_and_one() -> None:
    assert near_duplicates(np.zeros((0, 24), np.uint8), 8).tolist() == []
    assert near_duplicates(np.zeros((1, 24), np.uint8), 8).tolist() == [-1]


def test_what_is_no_hash_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[3, 8\]: expected uint8 \[n, 24\]"):
        near_duplicates(np.zeros((3, 8), np.uint8), 8)
    with pytest.raises(ValueError, match="bits=-1"):
        near_duplicates(np.zeros((3, 24), np.uint8), -1)
