"""Dense optical flow between frames (DIS, Kroeger et al. 2016, as OpenCV has it). cv2 is imported where it is used.

Legend: H × W pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Side of the smallest pictures that flow is looked for in; smaller frames are enlarged.
FLOW_SIDE = 256

Grey = NDArray[np.uint8]


def grey_of(frame: NDArray[np.uint8]) -> Grey:
    """A frame uint8 [H, W, 3] as flow is looked for in it: grey, and enlarged where it is small."""
    import cv2

    height, width = frame.shape[:2]
    scale = _scale(height, width)
    return np.asarray(cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (width * scale, height * scale)), np.uint8)


def flow_between(before: Grey, after: Grey, size: tuple[int, int], *, fast: bool = False) -> NDArray[np.float32]:
    """Flow [H, W, 2] (x, y) in pixels of frames of `size` (H, W), from one to the other (both of `grey_of`).

    `fast` takes a quarter of the time and is coarser: good enough to carry a picture along.
    """
    import cv2

    height, width = size
    preset = cv2.DISOPTICAL_FLOW_PRESET_FAST if fast else cv2.DISOPTICAL_FLOW_PRESET_MEDIUM
    estimator = cv2.DISOpticalFlow.create(preset)
    flow = estimator.calc(before, after, None)  # type: ignore[call-overload]
    return (cv2.resize(flow, (width, height)) / _scale(height, width)).astype(np.float32)


def _scale(height: int, width: int) -> int:
    return max(1, round(FLOW_SIDE / min(height, width)))
