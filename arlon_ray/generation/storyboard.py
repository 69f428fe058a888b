"""Which text belongs to which frames of a long video: prompts with durations, blended where one gives way to the next.

A video is made of whole segments; a prompt may begin and end at any latent frame of one, and a cut is where one segment
ends and the next begins. Legend: V texts of a segment, t latent frames of a segment, the first o of them the overlap
with the segment before.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from arlon_ray.config import GROUP_FRAMES, GROUP_LATENTS, LATENT_FRAMES, Config


@dataclass(frozen=True)
class Scene:
    """One part of a storyboard; `seconds` is how long it lasts (None: it gets its even share of whole segments).

    `cut`: it begins a new shot. Without, what is seen goes on and turns into what the prompt says.
    """

    prompt: str
    seconds: float | None = None
    cut: bool = False


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


#: What a segment's text says.
Words = str | ChangingText


@dataclass(frozen=True)
class Cut:
    """The text of a segment that begins a new shot: it takes over nothing of the one before, nor looks back on it."""

    text: Words


#: What a segment is about.
SegmentText = Words | Cut


def words_of(text: SegmentText) -> Words:
    """A segment's text, whether or not it begins behind a cut."""
    return text.text if isinstance(text, Cut) else text


def with_words(old: SegmentText, words: SegmentText) -> SegmentText:
    """What `words` says in place of `old`: a cut stays where it was."""
    return Cut(words_of(words)) if isinstance(old, Cut) else words


def prompts_in(text: SegmentText) -> tuple[str, ...]:
    """The prompts that count in a segment, in order."""
    words = words_of(text)
    return (words,) if isinstance(words, str) else words.prompts


def prompt_of(text: SegmentText, first: int = 0) -> str:
    """The prompt that counts most in a segment from latent frame `first` on."""
    words = words_of(text)
    if isinstance(words, str):
        return words
    totals = [sum(share[first:]) for share in words.shares]
    return words.prompts[totals.index(max(totals))]


def begins_shot(texts: Sequence[SegmentText], index: int) -> bool:
    """Whether segment `index` has nothing before it: it is the first one, or behind a cut."""
    return index == 0 or isinstance(texts[index], Cut)


def goes_on(texts: Sequence[SegmentText], index: int) -> bool:
    """Whether the text of segment `index` is that of the segment before, in the same shot."""
    return not begins_shot(texts, index) and words_of(texts[index - 1]) == texts[index]


def first_of_shot(texts: Sequence[SegmentText], index: int) -> int:
    """The segment that the shot of segment `index` begins with."""
    return next(i for i in range(index, -1, -1) if begins_shot(texts, i))


def first_of_prompt(texts: Sequence[SegmentText], index: int) -> int:
    """The segment that the text of segment `index` begins with."""
    return next(i for i in range(index, -1, -1) if not goes_on(texts, i))


def spread(scenes: Sequence[Scene], segments: int, behind: int = 0) -> list[SegmentText]:
    """The text of each of `segments`, every scene its even share; `behind`: so many are there already.

    Raises ValueError if a scene gets no segment.
    """
    if not scenes or segments < len(scenes):
        raise ValueError(f"{len(scenes)} prompts for {segments} segments: expected 1 prompt to {segments}")
    shown = [i * len(scenes) // segments for i in range(segments)]
    texts: list[SegmentText] = []
    for before, scene in pairwise([-1, *shown]):
        cut = scenes[scene].cut and scene != before and behind + len(texts)
        texts.append(Cut(scenes[scene].prompt) if cut else scenes[scene].prompt)
    return texts


def storyboard(scenes: Sequence[Scene], config: Config, *, transition: int = 0, behind: int = 0) -> list[SegmentText]:
    """The text of every segment of the shortest video whose shots last at least as long as their scenes together.

    The text of a scene is blended with the one before over the first `transition` latent frames of the scene, but for a
    cut, where there is nothing to blend. `behind`: so many segments are there already, and these are added to them.
    Raises ValueError for no scenes, and for durations that are missing, not above 0, or shorter than a latent frame.
    """
    if not scenes:
        raise ValueError("no scenes: expected at least one prompt")
    if transition < 0:
        raise ValueError(f"transition={transition}: expected 0 or more latent frames")
    for number, scene in enumerate(scenes, start=1):
        if scene.seconds is None or not (scene.seconds > 0 and math.isfinite(scene.seconds)):
            raise ValueError(f"scene {number} lasts {scene.seconds} seconds: expected a number above 0")
    cuts = [number for number, scene in enumerate(scenes) if scene.cut or not number]
    texts: list[SegmentText] = []
    for first, end in zip(cuts, [*cuts[1:], len(scenes)], strict=True):
        shot = _shot(scenes[first:end], config, transition, behind + len(texts), first + 1)
        texts += [Cut(shot[0]), *shot[1:]] if scenes[first].cut and behind + len(texts) else shot
    return texts


def _shot(scenes: Sequence[Scene], config: Config, transition: int, segment: int, first: int) -> list[Words]:
    """The texts of one shot's segments, from `segment` on; its first scene is scene `first`."""
    begins, end = [0], 0.0
    for number, scene in enumerate(scenes, start=first):
        end += scene.seconds or 0.0
        begins.append(_latent_at(end * config.video.fps))
        if begins[-1] == begins[-2]:
            shortest = LATENT_FRAMES / config.video.fps
            raise ValueError(f"scene {number} lasts {scene.seconds:g} seconds: expected at least {shortest:g}")
    overlap = config.segment.overlap_latents
    start = segment * (config.segment.latents - overlap) + overlap if segment else 0
    prompts, begins = [scene.prompt for scene in scenes], [start + begin for begin in begins[:-1]]
    count = segments_for(end, config, segment)
    return [_segment_text(prompts, begins, index, config, transition) for index in range(segment, segment + count)]


def _latent_at(frame: float) -> int:
    """The latent frame that begins nearest to a frame; groups begin with a latent of one frame."""
    group, rest = divmod(frame, GROUP_FRAMES)
    return int(group) * GROUP_LATENTS + (0 if rest < 0.5 else min(GROUP_LATENTS, 1 + round((rest - 1) / LATENT_FRAMES)))


def _segment_text(prompts: list[str], begins: list[int], index: int, config: Config, transition: int) -> Words:
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


def segments_for(seconds: float, config: Config, behind: int = 0) -> int:
    """The fewest whole segments that last at least `seconds`, behind so many that are there already."""
    # less a thousandth of a frame, so that asking for the playing time of a video gives its length again
    frames = math.ceil(seconds * config.video.fps - 1e-3)
    rest = max(0, frames - new_frames(config, behind))
    return 1 + math.ceil(rest / new_frames(config, 1))


def playing_time(segments: int, config: Config) -> str:
    """Seconds that a video of `segments` segments lasts, as text."""
    frames = new_frames(config, 0) + (segments - 1) * new_frames(config, 1)
    return format(frames / config.video.fps, ".10g")
