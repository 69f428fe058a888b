"""Rendered, captioned scenes with their exact truth, in the grades of `worlds.py`, which draws them.

The world is a torus: what leaves on one side comes back on the other, so that a direction stays true for a video of any
length and the start position tells nothing about it. Shapes: T frames, H × W pixels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arlon_ray.config import GROUP_FRAMES, VideoConfig
from arlon_ray.evaluation.world import COLOURS, DIRECTIONS, SPEEDS, Shot, track
from data_pipeline.worlds import Scene, caption, sample_scene, shot_captions, training_seed

NAME = "scene_{index:06d}"


def render(scene: Scene) -> NDArray[np.uint8]:
    """[T,H,W,3] RGB, antialiased: motion by fractions of a pixel stays visible."""
    return np.concatenate([render_shot(shot, scene.height, scene.width) for shot in scene.shots])


def render_shot(shot: Shot, height: int, width: int) -> NDArray[np.uint8]:
    """[T,H,W,3] RGB of one shot. Of two objects at one place the later one is in front."""
    scale = min(height, width) / 64
    camera = np.arange(shot.frames, dtype=np.float32) * np.float32(SPEEDS["normal"] * scale)
    camera_x, camera_y = (camera * step for step in DIRECTIONS[shot.pan])
    picture = _background(shot, height, width, camera_x, camera_y)
    for thing in shot.things:
        x, y, radius = track(thing, shot.frames, scale)
        dx = _on_torus(np.arange(width, dtype=np.float32) + 0.5 - (x - camera_x)[:, None], width)[:, None, :]
        dy = _on_torus(np.arange(height, dtype=np.float32) + 0.5 - (y - camera_y)[:, None], height)[:, :, None]
        cover = np.clip(0.5 - _distance(thing.shape, radius[:, None, None], dx, dy), 0, 1)[..., None]
        picture = picture + (np.array(COLOURS[thing.colour], np.float32) - picture) * cover
    return (picture + 0.5).astype(np.uint8)


def _on_torus(offset: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    return ((offset + size / 2) % size - size / 2).astype(np.float32)


def _background(
    shot: Shot, height: int, width: int, camera_x: NDArray[np.float32], camera_y: NDArray[np.float32]
) -> NDArray[np.float32]:
    """[T,H,W,3]. Nearly grey, so that an object's colour is never a matter of its surroundings.

    What has a texture has whole periods, so that it meets at the seam of the torus and moves with the camera.
    """
    x = 2 * np.pi * (np.arange(width, dtype=np.float32) + camera_x[:, None]) / width
    y = 2 * np.pi * (np.arange(height, dtype=np.float32) + camera_y[:, None]) / height
    x, y, phase = x[:, None, :], y[:, :, None], shot.background_phase
    grey = np.zeros((shot.frames, height, width), np.float32)
    if shot.background == "dark":
        grey += 44
    elif shot.background == "light":
        grey += 206
    elif shot.background == "gradient":
        grey += 40 + 130 * np.linspace(0, 1, height, endpoint=False, dtype=np.float32)[:, None]
    elif shot.background == "stripes":
        grey += 104 + 26 * np.sin(4 * x + phase)
    elif shot.background == "checks":
        grey += 112 + 30 * np.tanh(3 * np.sin(3 * x + phase) * np.sin(3 * y + phase))
    else:  # clouds
        waves = ((1, 2, 0.0), (2, -1, 1.7), (3, 1, 4.1), (-1, 3, 2.6))
        grey += 120 + 17 * sum(np.sin(a * x + b * y + shift + phase) for a, b, shift in waves)
    grey = (grey + np.float32(shot.background_level)).astype(np.float32)
    return np.stack([grey, grey, np.minimum(grey + 6, 255)], axis=-1)


def _distance(
    shape: str, radius: NDArray[np.float32], dx: NDArray[np.float32], dy: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Signed distance in pixels to the outline, negative inside; dx and dy from the centre. Areas are alike."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - np.float32(0.88) * radius
    sloped = np.abs(dx) * np.float32(np.sqrt(3) / 2) - dy * np.float32(0.5)
    return np.maximum(dy, sloped) - np.float32(0.62) * radius


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """Write [T,H,W,3] as H.264 (yuv420p, one GOP a group), atomically. Chroma is fine enough to keep colours."""
    import av  # rendering alone needs no video library

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


def truth_json(scene: Scene, **more: object) -> str:
    """One line of JSON with every field of the truth, the captions of scene and shots, and `more`."""
    captions = {"caption": caption(scene), "shot_captions": shot_captions(scene)}
    return json.dumps({**asdict(scene), **captions, **more}, sort_keys=True)


def timed_captions(scene: Scene, fps: float) -> dict[str, object]:
    """The caption of each shot and the second that it begins at, in the form that `sources.read_caption` reads."""
    begins = np.cumsum([0, *(shot.frames for shot in scene.shots)])[:-1] / fps
    parts = zip(begins.tolist(), shot_captions(scene), strict=True)
    return {"captions": [{"start_s": start, "caption": text} for start, text in parts]}


def write_sample(
    folder: str | Path, index: int, seed: int, video: VideoConfig, groups: Sequence[int], grade: str = "simple"
) -> bool:
    """Render sample `index` of `seed` into `folder`: mp4, `.txt` caption, `.json` ground truth.

    Where the caption changes, it is in the ground truth, with its times, instead of in a `.txt`.
    Returns False where exactly this sample is there already: the ground truth names all that the file depends on,
    `fps` among it. The mp4 comes last: if it is there, all of it is. Raises ValueError for an unknown grade.
    """
    path = Path(folder) / f"{NAME.format(index=index)}.mp4"
    scene = sample_scene(training_seed(seed, index), groups, video.height, video.width, grade)
    timed = timed_captions(scene, video.fps) if grade == "changing" else {}
    truth = truth_json(scene, fps=video.fps, groups=list(groups), **timed)
    facts = path.with_suffix(".json")
    if path.exists() and facts.exists() and facts.read_text() == truth:
        return False
    path.unlink(missing_ok=True)
    facts.write_text(truth)
    if timed:
        path.with_suffix(".txt").unlink(missing_ok=True)  # of another grade that was there
    else:
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


def write_samples(
    folder: str | Path, count: int, seed: int, video: VideoConfig, groups: Sequence[int], grade: str = "simple"
) -> int:
    """Render the samples that are missing, in this process, so that exactly `count` are there. The number rendered."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    remove_samples_from(folder, count)
    return sum(write_sample(folder, index, seed, video, groups, grade) for index in range(count))
