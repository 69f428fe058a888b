"""Making videos from a bundle: `VideoGenerator.from_bundle(path).generate(prompts)`; no Ray."""

from arlon_ray.generation.decoding import FrameDecoder
from arlon_ray.generation.editing import VideoEditor
from arlon_ray.generation.generator import VideoGenerator
from arlon_ray.generation.given import Given, given_clip, given_picture, same_given
from arlon_ray.generation.options import GenerationOptions, default_options, segment_options
from arlon_ray.generation.overlapped import Timeline
from arlon_ray.generation.planning import ArPlanner, SegmentTokens
from arlon_ray.generation.project import Project, ProjectError, ProjectSegment
from arlon_ray.generation.rendering import DiTRenderer, HandOver, SegmentLatents, behind_overlap
from arlon_ray.generation.storyboard import (
    ChangingText,
    Cut,
    Scene,
    SegmentText,
    begins_shot,
    new_frames,
    playing_time,
    prompt_of,
    segments_for,
    spread,
    storyboard,
    with_words,
)

__all__ = [
    "ArPlanner",
    "ChangingText",
    "Cut",
    "DiTRenderer",
    "FrameDecoder",
    "GenerationOptions",
    "Given",
    "HandOver",
    "Project",
    "ProjectError",
    "ProjectSegment",
    "Scene",
    "SegmentLatents",
    "SegmentText",
    "SegmentTokens",
    "Timeline",
    "VideoEditor",
    "VideoGenerator",
    "begins_shot",
    "behind_overlap",
    "default_options",
    "given_clip",
    "given_picture",
    "new_frames",
    "playing_time",
    "prompt_of",
    "same_given",
    "segment_options",
    "segments_for",
    "spread",
    "storyboard",
    "with_words",
]
