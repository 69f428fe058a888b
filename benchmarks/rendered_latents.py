"""Latents, text and tokens of rendered scenes, made in the background while a training reads them.

Processes render, one encodes on the device and writes shards: nothing but shards of tensors touches a disk, so that one
GPU trains on as many scenes as its processor can draw. A `RenderedLatents` reads them as they come.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from arlon_ray.config import Config
from arlon_ray.models.codec import LatentCodec, load_codec
from arlon_ray.models.text import TextEncoder, load_text_encoder
from arlon_ray.models.vae import VideoVAE, load_vae, to_video
from arlon_ray.training.engine import derived_seed
from data_pipeline.synthetic import render
from data_pipeline.worlds import Scene, sample_scene, shot_captions, training_seed

#: Scenes that one process renders at a time, and captions and videos that the device encodes at once.
CHUNK, TEXTS, VIDEOS = 64, 512, 64
NAME = "shard_{:05d}.safetensors"
#: Every so many samples of the first shard is held out.
HELD_OUT = 20
#: The number of the process that writes the shards of a folder.
RENDERER = "renderer.pid"


@dataclass(frozen=True)
class Mix:
    """A grade of scenes, the lengths of its videos in groups, and its share of a shard."""

    grade: str
    groups: tuple[int, ...]
    share: float
    still: bool = False  # only scenes in which nothing moves

    @classmethod
    def parse(cls, text: str) -> Mix:
        """`simple:2,3,4=0.8`, or `simple/still:2,3,4=0.8`. Raises ValueError."""
        found = re.fullmatch(r"(\w+)(/still)?:(\d+(?:,\d+)*)=([\d.]+)", text)
        if not found:
            raise ValueError(f"--mix {text}: expected GRADE[/still]:GROUPS,GROUPS=SHARE, as simple:2,3,4=0.8")
        return cls(found[1], tuple(map(int, found[3].split(","))), float(found[4]), bool(found[2]))

    def __str__(self) -> str:
        return f"{self.grade}{'/still' * self.still}:{','.join(map(str, self.groups))}={self.share:g}"

    def has(self, scene: Scene) -> bool:
        """Whether it is of this kind: of one shot, but for those that change on the way."""
        if len(scene.shots) > 1 and self.grade != "changing":
            return False
        return not self.still or all(
            shot.pan == "still" and all(thing.action == "still" for thing in shot.things) for shot in scene.shots
        )


@dataclass(frozen=True)
class Parts:
    """What scenes are encoded with; without codecs there are no tokens."""

    vae: Path
    codec_fine: Path | None = None
    codec_coarse: Path | None = None


class Rendered(NamedTuple):
    """Scenes of one length: what their last shots say, how many frames come before these, and a file of all frames."""

    captions: list[str]
    given_frames: list[int]
    file: Path  # uint8 [n, T, H, W, 3]


def scenes_of(config: Config, mix: Mix, seed: int) -> Iterator[Scene]:
    """Those of a mix, without end."""
    video = config.video
    for number in count():
        scene = sample_scene(training_seed(seed, number), mix.groups, video.height, video.width, mix.grade)
        if mix.has(scene):
            yield scene


def write_shards(
    config: Config,
    mixes: Sequence[Mix],
    parts: Parts,
    folder: Path,
    *,
    shards: int,
    size: int,
    seed: int,
    device: str,
    processes: int,
) -> None:
    """Write `shards` shards of about `size` scenes into `folder`. A training may read them meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = _Encoder(config, parts, device)
    streams = [scenes_of(config, mix, seed + number) for number, mix in enumerate(mixes)]
    counts = [round(size * mix.share) for mix in mixes]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:

        def begin() -> list[Future[list[Rendered]]]:
            """Of one shard: its scenes, a chunk a job."""
            chunks = chain.from_iterable(
                _chunks(islice(stream, number)) for stream, number in zip(streams, counts, strict=True)
            )
            return [pool.submit(_render_chunk, chunk, folder) for chunk in chunks]

        try:
            ahead = [begin() for _ in range(min(2, shards))]
            for number in range(shards):
                rendered = [future.result() for future in ahead.pop(0)]
                if number + 2 < shards:
                    ahead.append(begin())
                encoder.write(chain.from_iterable(rendered), folder / NAME.format(number))
        finally:
            pool.shutdown(cancel_futures=True)
            for left in folder.glob(".*.npy"):
                left.unlink()


def _chunks(scenes: Iterable[Scene]) -> Iterator[list[Scene]]:
    stream = iter(scenes)
    while chunk := list(islice(stream, CHUNK)):
        yield chunk


def _render_chunk(scenes: list[Scene], folder: Path) -> list[Rendered]:
    """One for each length."""
    found = []
    for length in sorted({scene.frames for scene in scenes}):
        same = [scene for scene in scenes if scene.frames == length]
        path = folder / f".{os.getpid()}-{same[0].seed}-{length}.npy"
        np.save(path, np.stack([render(scene) for scene in same]))
        given = [scene.frames - scene.shots[-1].frames for scene in same]
        found.append(Rendered([shot_captions(scene)[-1] for scene in same], given, path))
    return found


class _Encoder:
    """Frames and captions to what a training reads."""

    def __init__(self, config: Config, parts: Parts, device: str) -> None:
        self.config, self.device = config, device
        self.vae: VideoVAE = load_vae(parts.vae, device)
        self.text: TextEncoder = load_text_encoder(config.text, device)
        roles = {"fine": parts.codec_fine, "coarse": parts.codec_coarse}
        self.codecs: dict[str, LatentCodec] = {role: load_codec(path, device) for role, path in roles.items() if path}

    def write(self, rendered: Iterable[Rendered], path: Path) -> None:
        """Encode and write one shard; removes the frames."""
        buckets: dict[int, list[dict[str, Tensor]]] = {}
        captions: dict[int, list[str]] = {}
        for texts, given, file in rendered:
            frames, given_frames = np.load(file), torch.tensor(given)
            file.unlink()
            for rows in torch.arange(len(frames)).split(VIDEOS):
                values = self._values(frames[rows.numpy()]) | {"given_frames": given_frames[rows]}
                buckets.setdefault(frames.shape[1], []).append(values)
            captions.setdefault(frames.shape[1], []).extend(texts)
        tensors: dict[str, Tensor] = {}
        for length, found in buckets.items():
            joined = {name: torch.cat([each[name] for each in found]) for name in found[0]}
            joined |= self._texts(captions[length])
            tensors |= {f"{length}/{name}": value.cpu().contiguous() for name, value in joined.items()}
        partial_path = path.with_suffix(".partial")
        save_file(tensors, partial_path, {"captions": json.dumps(captions)})
        os.replace(partial_path, path)

    @torch.no_grad()
    def _values(self, frames: np.ndarray) -> dict[str, Tensor]:
        latents = self.vae.encode(to_video(frames).to(self.device))
        tokens = {f"tokens_{role}": codec.encode(latents).short() for role, codec in self.codecs.items()}
        return {"latents": latents.half(), **tokens}

    def _texts(self, captions: list[str]) -> dict[str, Tensor]:
        parts = [self.text.encode(captions[first : first + TEXTS]) for first in range(0, len(captions), TEXTS)]
        return {
            "text": torch.cat([part.values.half() for part in parts]),
            "text_mask": torch.cat([part.mask for part in parts]),
        }


class RenderedLatents:
    """A BatchSource of shards that may still be in the making.

    In `step` the first 1 + step // `every` shards are drawn from, and waited for where they are not there yet: so a
    batch depends on its step alone, however fast they are made. A batch is of clips of one length.
    """

    def __init__(
        self, config: Config, folder: Path, shards: int, batch_size: int, device: str, *, every: int = 50, seed: int = 0
    ) -> None:
        self.config, self.folder, self.shards, self.every, self.seed = config, folder, shards, every, seed
        self.batch_size, self.device = batch_size, device
        self._loaded = 0
        self._values: dict[str, dict[str, Tensor]] = {}
        self._held_out: dict[str, dict[str, Tensor]] = {}
        self._captions: dict[str, list[str]] = {}

    def batch(self, step: int, rank: int, world: int) -> dict[str, Any]:
        """See BatchSource."""
        self.load(min(self.shards, 1 + step // self.every))
        random = np.random.default_rng(derived_seed(self.seed, step, rank))
        rows = {length: len(values["text"]) for length, values in self._values.items()}
        lengths = sorted(rows)
        total = sum(rows.values())
        length = str(random.choice(lengths, p=[rows[each] / total for each in lengths]))
        chosen = torch.from_numpy(random.integers(rows[length], size=self.batch_size // world)).to(self.device)
        return self._batch({name: value[chosen] for name, value in self._values[length].items()}, chosen)

    def held_out_batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """See BatchSource."""
        self.load(1)
        for length, values in sorted(self._held_out.items()):
            for rows in torch.arange(len(values["text"])).split(batch_size):
                captions = [self._captions[length][row] for row in rows]
                yield self._batch({n: v[rows.to(self.device)] for n, v in values.items()}, rows) | {"caption": captions}

    def share(self, share: float) -> RenderedLatents:
        """A source of so much of the shards' number, for figures against the size of the data."""
        shards = max(1, round(self.shards * share))
        return RenderedLatents(
            self.config, self.folder, shards, self.batch_size, self.device, every=self.every, seed=self.seed
        )

    def load(self, shards: int) -> None:
        """The first so many shards."""
        while self._loaded < shards:
            path = self.folder / NAME.format(self._loaded)
            while not path.exists():
                if not self._is_rendered() and not path.exists():
                    raise RuntimeError(f"{path.name} is missing in {self.folder}, and nobody renders it any more")
                time.sleep(0.05)
            with safe_open(path, "pt", device=self.device) as file:
                for key in list(file.keys()):
                    length, name = key.split("/")
                    value = file.get_tensor(key)
                    if self._loaded == 0:
                        kept = torch.arange(len(value), device=self.device) % HELD_OUT == 0
                        self._held_out.setdefault(length, {})[name] = value[kept]
                        value = value[~kept]
                    bucket = self._values.setdefault(length, {})
                    bucket[name] = torch.cat([bucket[name], value]) if name in bucket else value
                if self._loaded == 0:
                    captions = json.loads(file.metadata()["captions"])
                    self._captions = {length: texts[::HELD_OUT] for length, texts in captions.items()}
            self._loaded += 1

    def _is_rendered(self) -> bool:
        """Whether a process is at work on the shards."""
        file = self.folder / RENDERER
        try:
            return psutil.Process(int(file.read_text())).status() != psutil.STATUS_ZOMBIE
        except (OSError, psutil.Error):
            return False

    def _batch(self, values: dict[str, Tensor], rows: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: value if value.dtype is torch.bool else value.float() if value.is_floating_point() else value.long()
            for name, value in values.items()
        }
        fps = torch.full((len(rows),), self.config.video.fps, device=self.device)
        return found | {"clip_id": rows, "fps": fps}


def rendered_latents(config: Config, count: int, parts: Parts, batch_size: int, device: str) -> RenderedLatents:
    """A source of `count` scenes of the configuration's grade, all rendered now."""
    mix = Mix(config.data.sample_grade, config.data.bucket_groups, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(
            config, [mix], parts, Path(folder), shards=1, size=count, seed=0, device=device, processes=1
        )  # fmt: skip
        source = RenderedLatents(config, Path(folder), 1, batch_size, device)
        source.load(1)
    return source


def in_background(target: Any, *arguments: Any, **named: Any) -> Any:
    """A process that runs `target`, and ends when this one does, however that is; its exit code says how it went."""
    process = get_context("spawn").Process(target=_as_long_as_parent, args=(partial(target, *arguments, **named),))
    process.start()
    return process


def _as_long_as_parent(work: Callable[[], None]) -> None:
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    work()


def render_in_background(config: Config, mixes: Sequence[Mix], parts: Parts, folder: Path, **named: Any) -> Any:
    """A process that does `write_shards` into `folder`, which has no shards of before any more."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("shard_*"):
        old.unlink()
    process = in_background(_write_until_told, config, mixes, parts, folder, **named)
    (folder / RENDERER).write_text(str(process.pid))
    return process


def _write_until_told(*arguments: Any, **named: Any) -> None:
    """`write_shards` whose own processes end with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    write_shards(*arguments, **named)
