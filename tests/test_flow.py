"""Flow between frames of any size, in pixels of the frames."""

from __future__ import annotations

import numpy as np
import pytest

from arlon_ray.flow import DenseFlow


@pytest.mark.parametrize("to_carry", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (144, 256), (300, 410)])
def test_a_shift_is_found_in_pixels_of_the_frames(size: tuple[int, int], to_carry: bool) -> None:
    height, width = size
    coarse = np.random.default_rng(0).integers(0, 255, (height // 8 + 2, width // 8 + 2, 3))
    wide = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
    before, after = wide[4 : height + 4, 5 : width + 5], wide[3 : height + 3, 3 : width + 3]
    flow = DenseFlow(height, width, to_carry=to_carry)
    found = flow.between(flow.grey(before), flow.grey(after))
    assert found.shape == (height, width, 2) and found.dtype == np.float32
    assert np.median(found.reshape(-1, 2), axis=0) == pytest.approx([2, 1], abs=0.25)


def test_what_it_looked_at_before_changes_nothing() -> None:
    random = np.random.default_rng(1)
    one, other, third = (
        np.kron(random.integers(0, 255, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in "abc"
    )
    flow, fresh = DenseFlow(64, 64, to_carry=True), DenseFlow(64, 64, to_carry=True)
    flow.between(flow.grey(third), flow.grey(one))
    assert np.array_equal(
        flow.between(flow.grey(one), flow.grey(other)), fresh.between(fresh.grey(one), fresh.grey(other))
    )
