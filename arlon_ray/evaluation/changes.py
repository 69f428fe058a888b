"""Whether a video does what it should before and after its prompt changes, and how soon the change shows.

Legend: T frames.
"""

from __future__ import annotations

from arlon_ray.config import GROUP_FRAMES
from arlon_ray.evaluation.metrics import meaning
from arlon_ray.evaluation.scenes import Frames
from arlon_ray.evaluation.world import Shot

#: Frames that are read at once when the change is looked for, and from one look to the next.
WINDOW, STRIDE = 12, 2
#: What is read of each part.
READ = ("object_class", "colour", "action", "direction")


def change_figures(frames: Frames, change: int, before: Shot, after: Shot) -> dict[str, float]:
    """Readings of uint8 [T, H, W, 3] whose text changes at frame `change`: 1 or 0 for each.

    `before_…` are of all frames before the change, `after_…` of those from one group behind it on.
    `delay_…` are the frames from the change to the first `WINDOW` that show what they should; where none does, there is
    no such figure.
    Raises ValueError if a part is shorter than a window.
    """
    if change < WINDOW or len(frames) - change < GROUP_FRAMES + WINDOW:
        raise ValueError(f"{len(frames)} frames that change at {change}: the parts are too short to be read")
    figures = {f"before_{name}": value for name, value in meaning(frames[:change], before).items() if name in READ}
    later = meaning(frames[change + GROUP_FRAMES :], after)
    figures |= {f"after_{name}": value for name, value in later.items() if name in READ}
    waited = {name for name in READ if later[name]}
    for first in range(change, len(frames) - WINDOW + 1, STRIDE):
        if not waited:
            break
        seen = meaning(frames[first : first + WINDOW], after)
        for name in [name for name in waited if seen[name]]:
            figures[f"delay_{name}"] = float(first - change)
            waited.discard(name)
    return figures
