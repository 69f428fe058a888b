"""Rendered, captioned scenes: one or two equal shapes that move over a background, on a torus.

What leaves on one side comes back on the other, so that the direction stays true for a video of any length and the
start position tells nothing about it. `Scene` is the exact ground truth. Shapes: T frames, H × W pixels.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from arlon_ray.config import GROUP_FRAMES, VideoConfig
from arlon_ray.evaluation.world import COLOURS, DIRECTIONS, SHAPES, SPEEDS
from data_pipeline.wording import compose

BACKGROUNDS = ("dark", "light", "gradient", "stripes")
#: Diameters (pixels, at 64) by number of objects.
DIAMETERS = {1: (22.0, 30.0), 2: (16.0, 20.0)}
PAIR_SHARE = 0.2
NAME = "scene_{index:06d}"


@dataclass(frozen=True)
class Scene:
    """The exact ground truth of one rendered video. Lengths in pixels, velocity in pixels a frame."""

    seed: int
    height: int
    width: int
    frames: int
    count: int
    shape: str
    colour: str
    background: str
    background_level: float
    background_phase: float
    direction: str
    speed: str
    velocity: tuple[float, float]
    diameter: float
    starts: tuple[tuple[float, float], ...]

    def to_json(self, **more: object) -> str:
        """One line of JSON with every field, the caption, and `more`."""
        return json.dumps({**asdict(self), "caption": caption(self), **more}, sort_keys=True)


def sample_scene(seed: int, groups: tuple[int, ...] = (2, 3, 4), height: int = 64, width: int = 64) -> Scene:
    """Draw a scene: equal seed and sizes, equal scene. Its length is one of `groups` × 17 frames."""
    random = np.random.default_rng([seed, 0])
    scale = min(height, width) / 64
    count = 2 if random.random() < PAIR_SHARE else 1
    direction = str(random.choice(list(DIRECTIONS)))
    speed = str(random.choice(list(SPEEDS)))
    low, high = DIAMETERS[count]
    diameter = float(random.uniform(low, high)) * scale
    first = (float(random.uniform(0, width)), float(random.uniform(0, height)))
    starts = [first]
    if count == 2:
        # apart by more than a diameter on the torus, so that two never look like one
        angle, distance = random.uniform(0, 2 * np.pi), random.uniform(1.25 * diameter, min(height, width) / 2)
        starts.append(
            (
                float((first[0] + distance * np.cos(angle)) % width),
                float((first[1] + distance * np.sin(angle)) % height),
            )
        )
    pixels = SPEEDS[speed] * scale
    unit = DIRECTIONS[direction]
    return Scene(
        seed=seed,
        height=height,
        width=width,
        frames=int(random.choice(list(groups))) * GROUP_FRAMES,
        count=count,
        shape=str(random.choice(SHAPES)),
        colour=str(random.choice(list(COLOURS))),
        background=str(random.choice(BACKGROUNDS)),
        background_level=float(random.uniform(-12, 12)),
        background_phase=float(random.uniform(0, 2 * np.pi)),
        direction=direction,
        speed=speed,
        velocity=(unit[0] * pixels, unit[1] * pixels),
        diameter=diameter,
        starts=tuple(starts),
    )


def caption(scene: Scene) -> str:
    """The scene in words (at most 20); equal scene, equal wording."""
    return compose(
        np.random.default_rng([scene.seed, 1]),
        count=scene.count,
        colour=scene.colour,
        shape=scene.shape,
        direction=scene.direction,
        speed=scene.speed,
        background=scene.background,
    )


def _background(scene: Scene) -> NDArray[np.float32]:
    """[H,W,3]. Nearly grey, so that the object's colour is never a matter of its surroundings."""
    x = np.linspace(0, 1, scene.width, endpoint=False, dtype=np.float32)
    y = np.linspace(0, 1, scene.height, endpoint=False, dtype=np.float32)[:, None]
    grey = np.zeros((scene.height, scene.width), np.float32)
    if scene.background == "dark":
        grey += 44
    elif scene.background == "light":
        grey += 206
    elif scene.background == "gradient":
        grey += 40 + 130 * y
    else:
        # whole periods: the stripes meet at the seam of the torus
        grey += 104 + 26 * np.sin(2 * np.pi * 4 * x + scene.background_phase).astype(np.float32)
    grey += np.float32(scene.background_level)
    return np.stack([grey, grey, np.minimum(grey + 6, 255)], axis=-1)


def _distance(shape: str, radius: float, dx: NDArray[np.float32], dy: NDArray[np.float32]) -> NDArray[np.float32]:
    """Signed distance in pixels to the outline, negative inside; dx and dy from the centre. Areas are alike."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - np.float32(radius)
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - np.float32(0.88 * radius)
    inner = np.float32(0.62 * radius)
    sloped = np.abs(dx) * np.float32(np.sqrt(3) / 2) - dy * np.float32(0.5)
    return np.maximum(dy, sloped) - inner


def render(scene: Scene) -> NDArray[np.uint8]:
    """[T,H,W,3] RGB, antialiased: motion by fractions of a pixel stays visible."""
    frames = np.arange(scene.frames, dtype=np.float32)
    cover = np.zeros((scene.frames, scene.height, scene.width), np.float32)
    pixel_x = np.arange(scene.width, dtype=np.float32) + 0.5
    pixel_y = np.arange(scene.height, dtype=np.float32) + 0.5
    for start_x, start_y in scene.starts:
        dx = pixel_x - (start_x + scene.velocity[0] * frames)[:, None]
        dy = pixel_y - (start_y + scene.velocity[1] * frames)[:, None]
        dx = ((dx + scene.width / 2) % scene.width - scene.width / 2)[:, None, :]
        dy = ((dy + scene.height / 2) % scene.height - scene.height / 2)[:, :, None]
        distance = _distance(scene.shape, scene.diameter / 2, dx.astype(np.float32), dy.astype(np.float32))
        np.maximum(cover, np.clip(0.5 - distance, 0, 1), out=cover)
    background = _background(scene)
    colour = np.array(COLOURS[scene.colour], np.float32)
    picture = background + (colour - background) * cover[..., None]
    return (picture + 0.5).astype(np.uint8)


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """Write [T,H,W,3] as H.264 (yuv420p, one GOP a group), atomically. Chroma is fine enough to keep colours."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream(
                "libx264",
                rate=Fraction(fps).limit_denominator(1001),
                options={"crf": "12", "preset": "veryfast", "threads": "1", "bf": "0"},
            )
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.gop_size = GROUP_FRAMES
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_sample(folder: str | Path, index: int, seed: int, video: VideoConfig, groups: tuple[int, ...]) -> bool:
    """Render sample `index` of `seed` into `folder`: mp4, `.txt` caption, `.json` ground truth.

    Returns False where exactly this sample is there already: the ground truth names all that the file depends on,
    `fps` among it. The mp4 comes last: if it is there, all of it is.
    """
    path = Path(folder) / f"{NAME.format(index=index)}.mp4"
    scene = sample_scene(seed * 1_000_003 + index, groups, video.height, video.width)
    truth = scene.to_json(fps=video.fps, groups=groups)
    facts = path.with_suffix(".json")
    if path.exists() and facts.exists() and facts.read_text() == truth:
        return False
    path.unlink(missing_ok=True)
    facts.write_text(truth)
    path.with_suffix(".txt").write_text(caption(scene) + "\n")
    write_mp4(path, render(scene), video.fps)
    return True


def remove_samples_from(folder: str | Path, count: int) -> int:
    """Remove the rendered samples numbered `count` and above (an earlier run's); the number removed."""
    beyond = [path for path in Path(folder).glob("scene_??????.mp4") if int(path.stem[6:]) >= count]
    for path in beyond:
        for suffix in (".mp4", ".txt", ".json"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    return len(beyond)


def write_samples(folder: str | Path, count: int, seed: int, video: VideoConfig, groups: tuple[int, ...]) -> int:
    """Render the samples that are missing, in this process, so that exactly `count` are there. The number rendered."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    remove_samples_from(folder, count)
    return sum(write_sample(folder, index, seed, video, groups) for index in range(count))
