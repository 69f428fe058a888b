"""Whether a video does what it should before and after its prompt changes, and how soon the change shows.

Legend: T frames.
"""

from __future__ import annotations

from arlon_ray.config import GROUP_FRAMES
from arlon_ray.evaluation.metrics import meaning
from arlon_ray.evaluation.scenes import Frames
from arlon_ray.evaluation.world import Shot

#: What is read of each part, and of how many frames at once when the change is looked for: what things look like shows
#: at once, what they do takes some frames. The looks are STRIDE frames apart.
READ = {"object_class": 2, "colour": 2, "action": 12, "direction": 12}
STRIDE, LONGEST = 2, max(READ.values())


def change_figures(frames: Frames, change: int, before: Shot, after: Shot) -> dict[str, float]:
    """Readings of uint8 [T, H, W, 3] whose text changes at frame `change`: 1 or 0 for each.

    `before_…` are of all frames before the change, `after_…` of those from one group behind it on.
    `delay_…` are the frames from the change to the first few (`READ`) that show what they should; where none does,
    there is no such figure.
    Raises ValueError if a part is shorter than the longest look.
    """
    if change < LONGEST or len(frames) - change < GROUP_FRAMES + LONGEST:
        raise ValueError(f"{len(frames)} frames that change at {change}: the parts are too short to be read")
    figures = {f"before_{name}": value for name, value in meaning(frames[:change], before).items() if name in READ}
    later = meaning(frames[change + GROUP_FRAMES :], after)
    figures |= {f"after_{name}": value for name, value in later.items() if name in READ}
    for name, count in READ.items():
        looks = range(change, len(frames) - count + 1, STRIDE) if later[name] else ()
        for first in looks:
            if meaning(frames[first : first + count], after)[name]:
                figures[f"delay_{name}"] = float(first - change)
                break
    return figures
