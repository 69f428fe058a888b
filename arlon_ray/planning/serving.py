"""Seconds of AR, DiT and decoder for a segment, and how many replicas of each a number of requests needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from arlon_ray.config import GROUP_FRAMES, Config
from arlon_ray.planning.counts import (
    ar_segment,
    branches,
    codec_group,
    dit_condition,
    dit_forward,
    dit_grid,
    text_caption,
    vae_group,
)
from arlon_ray.planning.hardware import CPU, Hardware
from arlon_ray.planning.media import fragment_work

#: Tokens of a caption, where nothing is known of it.
CAPTION_TOKENS = 32
#: Share of the time that replicas should be busy: above it queues grow long (M/M/1: at 70 % a request waits 2.3 times
#: as long as it is served).
BUSY = 0.7


class SegmentSeconds(NamedTuple):
    """Seconds that a segment takes in each of the three deployments, alone on its device."""

    ar: float
    dit: float
    decoder: float


def segment_seconds(config: Config, hardware: Hardware, first: bool = False) -> SegmentSeconds:
    """A segment in the middle of a long video, or the `first` one (its text is encoded, nothing is taken over).

    AR and DiT run on `hardware`; the decoder's VAE too, its mp4 on one core of a CPU. Options that leave parts of the
    DiT out (an interval of guidance, cached layers) are not reckoned with.
    """
    segment, length = config.segment, min(CAPTION_TOKENS, config.text.max_tokens)
    groups = segment.groups if first else segment.groups - segment.overlap_groups
    rows, grid = branches(config, first), dit_grid(config, segment.groups + (0 if first else config.dit.anchor_groups))
    guided = config.dit.injection.enabled and not config.sampling.baseline
    steps = ar_segment(config, length, first)
    planned = hardware.seconds("ar_context", steps.context) + hardware.seconds("ar", steps.step * steps.steps)
    planned *= guided
    rendered = hardware.seconds("dit", dit_condition(config.dit, *grid, length, rows, guided))
    rendered += config.sampling.evaluations * hardware.seconds("dit", dit_forward(config.dit, *grid, length, rows))
    if guided:
        rendered += hardware.seconds("codec", codec_group(config, "fine", encode=False) * segment.groups)
    if first:
        planned += hardware.seconds("text", text_caption(config.text, length))
    decoded = hardware.seconds("vae_decode", vae_group(config, encode=False) * groups)
    written = CPU.seconds("mp4", fragment_work(groups * GROUP_FRAMES, config.video.height * config.video.width))
    return SegmentSeconds(planned, rendered, decoded + written)


@dataclass(frozen=True)
class ServingPlan:
    """Replicas of each deployment (on a device of its own), and what a caller sees."""

    seconds: SegmentSeconds
    replicas: tuple[int, int, int]
    first_segment_s: float
    video_s: float
    shown_s: float
    bottleneck: str


def plan_serving(
    config: Config, hardware: Hardware, requests_per_hour: float, segments: int, busy: float = BUSY
) -> ServingPlan:
    """What so many videos an hour, each of so many segments, need. One segment at a time in each replica."""
    begin, later = segment_seconds(config, hardware, first=True), segment_seconds(config, hardware)
    whole = [one + (segments - 1) * more for one, more in zip(begin, later, strict=True)]
    ar, dit, decoder = (max(1, math.ceil(requests_per_hour * its / 3600 / busy)) for its in whole)
    frames = config.segment.groups_of(segments) * GROUP_FRAMES
    return ServingPlan(
        seconds=later,
        replicas=(ar, dit, decoder),
        first_segment_s=sum(begin),
        # segments go through one behind the other, the slowest part sets the pace
        video_s=sum(begin) + (segments - 1) * max(later),
        shown_s=frames / config.video.fps,
        bottleneck=("ar", "dit", "decoder")[whole.index(max(whole))],
    )
