"""Video files, good and broken, and small datasets for the tests of the data pipeline."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline import schema
from data_pipeline.manifest import (
    DatasetManifest,
    TokenManifest,
    dataset_fingerprint,
    settings_key,
    write_manifest,
)
from data_pipeline.parquet import write_table
from data_pipeline.schema import LATENT, SCHEMA_VERSION, TOKEN

TEXT_DIM, MAX_TOKENS = 6, 5


def write_video(path: Path, frames: NDArray[np.uint8], fps: int = 16, index: str = "faststart", **options: str) -> None:
    """H.264 of [T,H,W,3]; `index` "faststart" puts the file's index first; `options` are x264's."""
    with av.open(str(path), "w", options={"movflags": index}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "8", "threads": "1", **options})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def numbered(count: int, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    """Frames that tell their number: its eight bits are eight vertical bars, white for one."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    bars = np.repeat(bits, width // 8, axis=1).astype(np.uint8) * 255
    return np.ascontiguousarray(np.broadcast_to(bars[:, None, :, None], (count, height, width, 3)))


def numbers_of(frames: NDArray[np.uint8]) -> list[int]:
    """The numbers of frames of `numbered`."""
    bars = frames.mean(axis=(1, 3)).reshape(len(frames), 8, -1).mean(-1) > 127
    return [int(number) for number in (bars << np.arange(8)).sum(1)]


class Brightness:
    """A captioner: says how bright a clip is."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(self, clips: list[NDArray[np.uint8]]) -> list[str]:
        return [f"a {'bright' if clip.mean() > 110 else 'dark'} {self.word}" for clip in clips]


def write_broken(folder: Path) -> dict[str, str]:
    """One file of every broken kind, captioned but for one; the reason expected for each."""
    good = folder / "good.bytes.mp4"
    write_video(good, np.random.default_rng(0).integers(0, 255, (68, 64, 64, 3), dtype=np.uint8))
    whole = good.read_bytes()
    good.unlink()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video " * 50)
    write_video(folder / "cut_off.mp4", numbered(40), index="0")
    (folder / "cut_off.mp4").write_bytes((folder / "cut_off.mp4").read_bytes()[:-100])
    # the index is whole, the pictures are not
    (folder / "cut_pictures.mp4").write_bytes(_with_noise(whole))
    (folder / "folder.mp4").mkdir()
    write_video(folder / "short.mp4", numbered(20))
    write_video(folder / "nocaption.mp4", numbered(40))
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for number in range(10):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 16000, number * 1024
            container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    reasons = {
        "empty.mp4": schema.EMPTY,
        "text.mp4": schema.UNREADABLE,
        "folder.mp4": schema.UNREADABLE,
        "cut_off.mp4": schema.UNREADABLE,
        "cut_pictures.mp4": schema.DECODE_FAILED,
        "short.mp4": schema.TOO_SHORT,
        "nocaption.mp4": schema.MISSING_CAPTION,
        "audio.mp4": schema.NO_VIDEO,
    }
    for name in reasons:
        if name != "nocaption.mp4":
            (folder / name).with_suffix(".txt").write_text("a caption")
    return reasons


def _with_noise(whole: bytes) -> bytes:
    """The file with the second half of its picture data overwritten."""
    start = whole.index(b"mdat") + 4
    middle = start + (len(whole) - start) // 3
    return whole[:middle] + b"\xff" * (len(whole) - middle)


def write_dataset(folder: Path, buckets: dict[str, int], row_group: int = 4, tokens: bool = True) -> None:
    """A dataset with made-up latents [2,t,2,2] whose values are the clip id; ids count up from 100."""
    next_id, ids = 100, []
    (folder / "tokens").mkdir(parents=True)
    for bucket, count in buckets.items():
        frames = int(bucket.split("x")[0])
        grid = (frames // 17 * 5, 2, 2)
        rows, token_rows = [], []
        for clip_id in range(next_id, next_id + count):
            length = clip_id % (MAX_TOKENS - 1) + 1
            rows.append(
                {
                    "clip_id": clip_id,
                    "source": f"{clip_id}.mp4",
                    "uri": f"/videos/{clip_id}.mp4",
                    "start_s": 0.0,
                    "end_s": frames / 16,
                    "fps": 16.0,
                    "height": 16,
                    "width": 16,
                    "num_frames": frames,
                    "given_frames": clip_id % 3 * 4,
                    "caption": f"clip {clip_id}",
                    "source_height": 16,
                    "source_width": 16,
                    "source_duration_s": frames / 16,
                    "latent": np.full((2, *grid), clip_id, np.float16).tobytes(),
                    "latent_shape": [2, *grid],
                    "text_embedding": np.full((length, TEXT_DIM), clip_id, np.float16).tobytes(),
                    "text_length": length,
                }
            )
            token_rows.append(
                {
                    "clip_id": clip_id,
                    "tokens_fine": [clip_id] * int(np.prod(grid)),
                    "grid_fine": list(grid),
                    "tokens_coarse": [clip_id + 1] * grid[0],
                    "grid_coarse": [grid[0], 1, 1],
                }
            )
        place = folder / "latents" / f"bucket={bucket}"
        place.mkdir(parents=True)
        write_table(pa.Table.from_pylist(rows, schema=LATENT), place / "part-00000.parquet", row_group)
        write_table(
            pa.Table.from_pylist(token_rows, schema=TOKEN),
            folder / "tokens" / f"{bucket}-part-00000.parquet",
            row_group,
        )
        ids += range(next_id, next_id + count)
        next_id += count
    fingerprint = dataset_fingerprint(
        np.array(ids), "a" * 64, [f"clip {number}" for number in ids], [i % 3 * 4 for i in ids]
    )
    common = {
        "schema_version": SCHEMA_VERSION,
        "settings": {},
        "key": settings_key({}),
        "vae_fingerprint": "a" * 64,
        "rows": len(ids),
        "created": "",
    }
    write_manifest(
        folder,
        DatasetManifest(
            **common,
            fingerprint=fingerprint,
            input="",
            text_identity="text:1",
            text_dim=TEXT_DIM,
            text_max_tokens=MAX_TOKENS,
            latent_channels=2,
            buckets=buckets,
            rejects=0,
        ),
    )
    write_manifest(
        folder / "tokens",
        TokenManifest(
            **common,
            fingerprint="t",
            dataset_fingerprint=fingerprint,
            fine_fingerprint="f" * 64,
            coarse_fingerprint="c" * 64,
            fine_codebook_size=512,
            coarse_codebook_size=512,
        ),
    )
