"""What the targets work on, made once for a run: videos, artefacts of minimal sizes, a dataset and its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.synthetic import write_samples
from tests.bundles import SMALL, make_random_bundle, small_config
from tests.chaos.programs import run

SMALL_SETS = [word for setting in SMALL for word in ("--set", setting)]


@dataclass(frozen=True)
class World:
    """Paths below `folder`."""

    folder: Path

    @property
    def videos(self) -> Path:
        """24 captioned videos."""
        return self._made("videos", lambda path: write_samples(path, 24, 0, small_config().video, (2, 3)))

    @property
    def bundle(self) -> Path:
        """A bundle of random weights, whose DiT takes a moment."""
        return self._made(
            "bundle", lambda path: make_random_bundle(path, "dit.depth=6", "dit.hidden_size=64", "serve.max_running=1")
        )

    @property
    def parts(self) -> Path:
        """The artefacts of the bundle, each in its folder."""
        return self.bundle.parent / "bundle-parts"

    @property
    def dataset(self) -> Path:
        """Latents of the videos."""
        flags = ["--input", self.videos, "--vae", self.parts / "vae", *SMALL_SETS]
        return self._made("dataset", lambda path: run("preprocess", [*flags, "--output", path], self.log))

    @property
    def many_videos(self) -> Path:
        """48 of them, of two groups each."""
        return self._made("many_videos", lambda path: write_samples(path, 48, 1, small_config().video, (2,)))

    @property
    def whole_dataset(self) -> Path:
        """Latents of the many videos, made by a run that nobody disturbs."""
        flags = ["--input", self.many_videos, "--vae", self.parts / "vae", "--set", "data.bucket_groups=[2]"]
        return self._made(
            "whole_dataset", lambda path: run("preprocess", [*flags, *SMALL_SETS, "--output", path], self.log)
        )

    @property
    def tokens(self) -> Path:
        """Tokens of the dataset."""
        codecs = ["--codec-fine", self.parts / "codec_fine", "--codec-coarse", self.parts / "codec_coarse"]
        flags = ["--dataset", self.dataset, *codecs, *SMALL_SETS]
        return self._made("tokens", lambda path: run("extract_tokens", [*flags, "--output", path], self.log))

    @property
    def log(self) -> Path:
        """What the commands print that make all this."""
        return self.folder / "world.log"

    def _made(self, name: str, make) -> Path:  # type: ignore[no-untyped-def]
        path, done = self.folder / name, self.folder / f"{name}.done"
        if not done.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            make(path)
            done.touch()
        return path
