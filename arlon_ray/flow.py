"""Dense optical flow between frames (DIS, Kroeger et al. 2016, as OpenCV has it). cv2 is imported where it is used.

Legend: H × W pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Sides of the smallest pictures that flow is looked for in, to measure and to carry; smaller frames are enlarged.
MEASURED_SIDE, CARRIED_SIDE = 256, 128
#: Descents of a patch, and refinements of each scale, of flow that carries pictures.
DESCENTS, REFINEMENTS = 8, 2

Grey = NDArray[np.uint8]


class DenseFlow:
    """Flow between frames of one size.

    `to_carry`: in a tenth of the time, good enough to carry a picture along, and smoother (docs/long_video.md).
    """

    def __init__(self, height: int, width: int, *, to_carry: bool = False) -> None:
        import cv2

        self.height, self.width = height, width
        self._scale = max(1, round((CARRIED_SIDE if to_carry else MEASURED_SIDE) / min(height, width)))
        preset = cv2.DISOPTICAL_FLOW_PRESET_FAST if to_carry else cv2.DISOPTICAL_FLOW_PRESET_MEDIUM
        self._estimator = cv2.DISOpticalFlow.create(preset)
        if to_carry:
            self._estimator.setGradientDescentIterations(DESCENTS)
            self._estimator.setVariationalRefinementIterations(REFINEMENTS)

    def grey(self, frame: NDArray[np.uint8]) -> Grey:
        """A frame uint8 [H, W, 3] as flow is looked for in it: grey, and enlarged where it is small."""
        import cv2

        size = (self.width * self._scale, self.height * self._scale)
        return np.asarray(cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size), np.uint8)

    def between(self, before: Grey, after: Grey) -> NDArray[np.float32]:
        """Flow [H, W, 2] (x, y) in pixels of the frames, from one to the other, both of `grey`."""
        import cv2

        flow = self._estimator.calc(before, after, None)  # type: ignore[call-overload]
        return np.asarray(cv2.resize(flow, (self.width, self.height)) / self._scale, np.float32)
