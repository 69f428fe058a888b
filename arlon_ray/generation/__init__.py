"""Making videos from a bundle: `VideoGenerator.from_bundle(path).generate(prompts)`; no Ray."""

from arlon_ray.generation.decoding import FrameDecoder
from arlon_ray.generation.generator import VideoGenerator, spread_prompts
from arlon_ray.generation.given import Given, given_clip, given_picture
from arlon_ray.generation.options import GenerationOptions, default_options
from arlon_ray.generation.planning import ArPlanner, SegmentTokens
from arlon_ray.generation.rendering import DiTRenderer, SegmentLatents, behind_overlap

__all__ = [
    "ArPlanner",
    "DiTRenderer",
    "FrameDecoder",
    "GenerationOptions",
    "Given",
    "SegmentLatents",
    "SegmentTokens",
    "VideoGenerator",
    "behind_overlap",
    "default_options",
    "given_clip",
    "given_picture",
    "spread_prompts",
]
