"""Which text belongs to which frames of a long video: prompts with durations, blended where one gives way to the next.

A video is made of whole segments; a prompt may begin and end at any latent frame of one. Legend: V texts of a segment,
t latent frames of a segment, the first o of them the overlap with the segment before.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from arlon_ray.config import GROUP_FRAMES, GROUP_LATENTS, LATENT_FRAMES, Config


@dataclass(frozen=True)
class Scene:
    """One part of a storyboard; `seconds` is how long it lasts (None: it gets its even share of whole segments)."""

    prompt: str
    seconds: float | None = None


@dataclass(frozen=True)
class ChangingText:
    """The text of a segment in which it changes: `shares[v][i]` is how much prompts[v] counts in latent frame i."""

    prompts: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]

    def spans(self, first: int, unit: int = 1) -> list[tuple[str, int]]:
        """(prompt, latent frames) from frame `first` on, in units of so many: the prompt that counts most in each."""
        weights = [[sum(share[i : i + unit]) for share in self.shares] for i in range(first, len(self.shares[0]), unit)]
        strongest = [self.prompts[weight.index(max(weight))] for weight in weights]
        return [(prompt, unit * len(list(same))) for prompt, same in groupby(strongest)]


#: What a segment is about.
SegmentText = str | ChangingText


def prompts_in(text: SegmentText) -> tuple[str, ...]:
    """The prompts that count in a segment, in order."""
    return (text,) if isinstance(text, str) else text.prompts


def prompt_of(text: SegmentText, first: int = 0) -> str:
    """The prompt that counts most in a segment from latent frame `first` on."""
    if isinstance(text, str):
        return text
    totals = [sum(share[first:]) for share in text.shares]
    return text.prompts[totals.index(max(totals))]


def goes_on(texts: Sequence[SegmentText], index: int) -> bool:
    """Whether the text of segment `index` is that of the segment before."""
    return index > 0 and texts[index - 1] == texts[index]


def spread_prompts(prompts: Sequence[str], segments: int) -> list[str]:
    """A prompt for each of `segments`, in order and evenly. Raises ValueError if a prompt gets no segment."""
    if not prompts or segments < len(prompts):
        raise ValueError(f"{len(prompts)} prompts for {segments} segments: expected 1 prompt to {segments}")
    return [prompts[i * len(prompts) // segments] for i in range(segments)]


def storyboard(scenes: Sequence[Scene], config: Config, *, transition: int = 0) -> list[SegmentText]:
    """The text of every segment of the shortest video that lasts at least as long as all scenes together.

    The text of a scene is blended with the one before over the first `transition` latent frames of the scene. Raises
    ValueError for no scenes, and for durations that are missing, not above 0, or shorter than a latent frame.
    """
    if not scenes:
        raise ValueError("no scenes: expected at least one prompt")
    if transition < 0:
        raise ValueError(f"transition={transition}: expected 0 or more latent frames")
    begins, end = [0], 0.0
    for number, scene in enumerate(scenes, start=1):
        if scene.seconds is None or not (scene.seconds > 0 and math.isfinite(scene.seconds)):
            raise ValueError(f"scene {number} lasts {scene.seconds} seconds: expected a number above 0")
        end += scene.seconds
        begins.append(_latent_at(end * config.video.fps))
        if begins[-1] == begins[-2]:
            shortest = LATENT_FRAMES / config.video.fps
            raise ValueError(f"scene {number} lasts {scene.seconds:g} seconds: expected at least {shortest:g}")
    segments = segments_for(end, config)
    prompts = [scene.prompt for scene in scenes]
    return [_segment_text(prompts, begins[:-1], index, config, transition) for index in range(segments)]


def _latent_at(frame: float) -> int:
    """The latent frame that begins nearest to a frame; groups begin with a latent of one frame."""
    group, rest = divmod(frame, GROUP_FRAMES)
    return int(group) * GROUP_LATENTS + (0 if rest < 0.5 else min(GROUP_LATENTS, 1 + round((rest - 1) / LATENT_FRAMES)))


def _segment_text(prompts: list[str], begins: list[int], index: int, config: Config, transition: int) -> SegmentText:
    """The text of segment `index`: what its new latent frames are about; those of the overlap are rendered already."""
    segment = config.segment
    start = index * (segment.latents - segment.overlap_latents)
    first = segment.overlap_latents if index else 0
    # from the last prompt that is all there at the first new frame to the last that comes in before the end
    heard = range(
        max(0, bisect_right(begins, start + first - transition) - 1), bisect_right(begins, start + segment.latents - 1)
    )
    if len(heard) == 1:
        return prompts[heard[0]]

    def share(v: int, latent: int) -> float:
        gone = _arrived(begins[v + 1], latent, transition) if v + 1 < len(begins) else 0.0
        return (_arrived(begins[v], latent, transition) if v else 1.0) - gone

    # frames of the overlap have nothing to say: they get the shares of the first new one
    latents = [start + max(i, first) for i in range(segment.latents)]
    return ChangingText(
        tuple(prompts[v] for v in heard), tuple(tuple(share(v, latent) for latent in latents) for v in heard)
    )


def _arrived(begin: int, latent: int, transition: int) -> float:
    """How far the prompt that begins there has replaced the ones before it in a latent frame."""
    return min(1.0, max(0.0, (latent - begin + 1) / (transition + 1)))


def new_frames(config: Config, index: int) -> int:
    """Frames that segment `index` adds to the video: the overlap was rendered by the segment before."""
    overlap = config.segment.overlap_groups if index else 0
    return (config.segment.groups - overlap) * GROUP_FRAMES


def segments_for(seconds: float, config: Config) -> int:
    """The fewest whole segments that last at least `seconds`."""
    # less a thousandth of a frame, so that asking for the playing time of a video gives its length again
    frames = math.ceil(seconds * config.video.fps - 1e-3)
    rest = max(0, frames - new_frames(config, 0))
    return 1 + math.ceil(rest / new_frames(config, 1))


def playing_time(segments: int, config: Config) -> str:
    """Seconds that a video of `segments` segments lasts, as text."""
    frames = new_frames(config, 0) + (segments - 1) * new_frames(config, 1)
    return format(frames / config.video.fps, ".10g")
