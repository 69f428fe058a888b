"""Near-duplicates among perceptual hashes, found without comparing all pairs.

Pigeonhole principle: of bits + 1 bands of two hashes that differ in at most `bits` bits, one band at least is equal in
both. So rows are compared with those alone that they share a band with.

Later rows are compared with earlier ones that are *kept*, half against half: of many clips that are all alike the first
half leaves one, and the second half is compared with that one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 24
#: Rows that are few enough to compare all with all, and pairs that are compared at a time: what a cache holds.
FEW_ROWS, PAIRS_AT_ONCE = 512, 1 << 16
#: The widest band that is one integer.
BAND_BITS = 64

Rows = NDArray[np.int64]


def near_duplicates(hashes: NDArray[np.uint8], bits: int) -> Rows:
    """For each row the row that it is a near-duplicate of, -1 where it is kept: [n].

    `hashes` is [n,24]. Rows stand in order of precedence: a row is dropped if a row before it that is kept differs in
    `bits` of the 192 bits at most; of several such rows the first is named. Raises ValueError for another shape of
    `hashes`, or for `bits` that are negative or not below 192.
    """
    if hashes.ndim != 2 or hashes.shape[1] != HASH_BYTES or hashes.dtype != np.uint8:
        raise ValueError(f"hashes are {hashes.dtype} {list(hashes.shape)}: expected uint8 [n, {HASH_BYTES}]")
    if not 0 <= bits < 8 * HASH_BYTES:
        raise ValueError(f"bits={bits}: expected 0 to {8 * HASH_BYTES - 1}")
    if not len(hashes):
        return np.zeros(0, np.int64)
    # equal hashes, however many, are one row from here on: the first of them
    packed = np.ascontiguousarray(hashes).view(f"V{HASH_BYTES}").ravel()
    _, first, which = np.unique(packed, return_index=True, return_inverse=True)
    distinct = np.sort(first)
    search = _Search(np.ascontiguousarray(hashes[distinct]), bits)
    search.keep(np.arange(len(distinct)))
    of = np.full(len(hashes), -1, np.int64)
    of[distinct] = np.where(search.of >= 0, distinct[search.of], -1)
    original = first[which.ravel()]
    repeated = original != np.arange(len(hashes))
    of[repeated] = np.where(of[original] >= 0, of[original], original)[repeated]
    return of


class _Search:
    """Distinct hashes [n,24] and, as far as they are found, the rows that they are near-duplicates of."""

    def __init__(self, hashes: NDArray[np.uint8], bits: int) -> None:
        self.bits = bits
        self.words = np.ascontiguousarray(hashes.view(np.uint64).T)
        self.bands = _bands(hashes, max(bits + 1, 8 * HASH_BYTES // BAND_BITS))
        self.of: Rows = np.full(len(hashes), -1, np.int64)

    def keep(self, rows: Rows) -> Rows:
        """Those of the ascending `rows` that are kept, considering no others; `of` is set for the rest."""
        if len(rows) <= FEW_ROWS:
            return self._keep_of_few(rows)
        middle = len(rows) // 2
        earlier = self.keep(rows[:middle])
        return np.concatenate([earlier, self.keep(self._far_from(earlier, rows[middle:]))])

    def _keep_of_few(self, rows: Rows) -> Rows:
        distance = np.zeros((len(rows), len(rows)), np.uint8)
        for word in self.words[:, rows]:
            distance += np.bitwise_count(word[:, None] ^ word[None, :])
        near = np.triu(distance <= self.bits, 1)
        dropped = np.zeros(len(rows), bool)
        for place in np.flatnonzero(near.any(1)):
            if not dropped[place]:
                fresh = near[place] & ~dropped
                self.of[rows[fresh]] = rows[place]
                dropped |= fresh
        return rows[~dropped]

    def _far_from(self, kept: Rows, rows: Rows) -> Rows:
        """Those of `rows` that are no near-duplicates of a `kept` row; `of` is set for the rest."""
        nearest = np.full(len(rows), len(self.of), np.int64)
        for band in self.bands:
            for place, candidate in _equal_pairs(band[kept], band[rows]):
                near = self._near(kept[candidate], rows[place])
                np.minimum.at(nearest, place[near], kept[candidate[near]])
        far = nearest == len(self.of)
        self.of[rows[~far]] = nearest[~far]
        return rows[far]

    def _near(self, one: Rows, other: Rows) -> Rows:
        """Places of the pairs that differ in `bits` bits at most; word after word, for most differ in the first."""
        places = np.arange(len(one))
        distance = np.zeros(len(one), np.uint8)
        for word in self.words:
            distance = distance + np.bitwise_count(word[one[places]] ^ word[other[places]])
            close = distance <= self.bits
            places, distance = places[close], distance[close]
        return places


def _bands(hashes: NDArray[np.uint8], count: int) -> list[NDArray[np.uint64]]:
    """The 192 bits of each hash [n,24] as `count` integers of about equal width: `count` × [n]."""
    bands = []
    for band in np.array_split(np.arange(8 * HASH_BYTES), count):
        begin, end = int(band[0]), int(band[-1]) + 1
        bits = np.unpackbits(hashes[:, begin // 8 : -(-end // 8)], axis=1)[:, begin % 8 :][:, : end - begin]
        whole = np.zeros((len(hashes), 8), np.uint8)
        packed = np.packbits(bits, axis=1)
        whole[:, : packed.shape[1]] = packed
        bands.append(whole.view(np.uint64).ravel())
    return bands


def _equal_pairs(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> Iterator[tuple[Rows, Rows]]:
    """All (place in `right`, place in `left`) of equal values, about `PAIRS_AT_ONCE` at a time."""
    order = np.argsort(left, kind="stable")
    # looked up in ascending order, neighbours in memory follow each other
    turn = np.argsort(right, kind="stable")
    ordered, asked = left[order], right[turn]
    begin = np.searchsorted(ordered, asked, "left")
    matches = np.searchsorted(ordered, asked, "right") - begin
    found = np.flatnonzero(matches)
    turn, begin, matches = turn[found], begin[found], matches[found]
    end = np.cumsum(matches)
    row = 0
    while row < len(turn):
        done = end[row] - matches[row]
        last = max(row + 1, int(np.searchsorted(end, done + PAIRS_AT_ONCE, "right")))
        size = matches[row:last]
        offset = np.arange(end[last - 1] - done) - np.repeat(end[row:last] - size - done, size)
        yield np.repeat(turn[row:last], size), order[np.repeat(begin[row:last], size) + offset]
        row = last
