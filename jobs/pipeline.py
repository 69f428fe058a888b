"""The whole of it: raw video in, long video served. `python jobs/pipeline.py --config tiny`.

Every stage is skipped if what it would make is there already, made from the same settings and parents (lineage decides,
not the presence of files); so the same command goes on after Ctrl-C, and reaches the video at once when all is trained.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arlon_ray import mirror
from arlon_ray.artifact import load_artifact
from arlon_ray.bundle import save_bundle
from arlon_ray.config import Config, config_fingerprint
from arlon_ray.training.stages.dit import initial_dit, text_only
from data_pipeline.sources import find_videos
from jobs.command_line import InputError, collection, output_folder, parser, read_config, run, vae_folder
from jobs.extract_tokens import run_extract_tokens
from jobs.gates import Gates, check_ar, check_codec
from jobs.holding import alone
from jobs.preprocess import run_preprocess
from jobs.ray_session import connect
from jobs.ray_training import check_workers
from jobs.render_samples import run_render_samples
from jobs.serve_demo import DEMO_PROMPTS, serve_demo
from jobs.stage_runs import Role, StageOutcome, fitting_codec, run_ar, run_codec, run_dit, run_vae
from jobs.tracking import Tracking


class Ledger:
    """What each stage took and its key figure, for the table at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str]] = []

    def stage(self, name: str, work: Callable[[], Any], figure: Callable[[Any], str]) -> Any:
        """Run one stage under a heading and note it."""
        print(f"\n── {name}", flush=True)
        begin = time.perf_counter()
        result = work()
        self.rows.append((name, time.perf_counter() - begin, figure(result)))
        return result

    def table(self) -> str:
        """Stage, seconds, key figure."""
        lines = [f"{'stage':<16}{'seconds':>9}  key figure"]
        lines += [f"{name:<16}{seconds:>9.1f}  {figure}" for name, seconds, figure in self.rows]
        total = sum(seconds for _, seconds, _ in self.rows)
        return "\n".join([*lines, f"{'total':<16}{total:>9.1f}"])


class Pipeline:
    """The stages in order, over one output folder."""

    def __init__(self, config: Config, source: str | None, output: Path) -> None:
        self.config, self.source, self.output = config, source, output
        self.tracking, self.ledger = Tracking(config, output), Ledger()
        self.trained_now = False

    def check(self) -> None:
        """Find bad input before Ray starts. Raises InputError or ArtifactError."""
        config = self.config
        if self.source is not None and not find_videos(self.source, config.data):
            raise InputError(f"--input {self.source}: no video files (.mp4, .mkv, .webm, …)")
        if not config.vae.train:
            vae = load_artifact(vae_folder(None, config), "vae")
            if (found := vae.config["latent_channels"]) != config.vae.latent_channels:
                raise InputError(f"vae.latent_channels={config.vae.latent_channels}, but {vae.path} has {found}")
        fine, coarse = config.vqvae.fine.training, config.vqvae.coarse.training
        stages = {"vqvae_fine": fine, "vqvae_coarse": coarse, "ar": config.ar.training, "dit": config.dit.training}
        for name, training in stages.items():
            check_workers(name, training, config)

    def run(self) -> None:
        """All stages, in one Ray session and under one MLflow run. Raises BusyError while another job does the same."""
        self.check()
        key = config_fingerprint(self.config)
        with (
            alone(self.config, self.output, "pipeline"),
            connect(self.config),
            self.tracking.pipeline("pipeline", key=key),
        ):
            bundle = self.train()
            if mirror.origin(self.output) is None:
                self.serve(bundle)
        print(f"\n{self.ledger.table()}\n\n{self.next_commands(bundle)}", flush=True)

    def train(self) -> Path:
        """Videos to a bundle."""
        config, output, stage = self.config, self.output, self.ledger.stage
        rendered = output / "videos"
        videos = self.source or mirror.origin(rendered) or str(rendered)
        if self.source is None:
            stage(
                "sample videos",
                lambda: run_render_samples(config, rendered),
                lambda count: f"{count} rendered" if count else "there already",
            )
        vae = self._vae(videos)
        dataset = stage(
            "preprocess",
            lambda: run_preprocess(config, videos, output / "dataset", vae=vae, overwrite=True),
            lambda summary: f"{summary.manifest.rows} clips, {summary.manifest.rejects} rejected",
        ).folder
        fine, coarse = self._codec("fine", dataset, vae), self._codec("coarse", dataset, vae)
        self._gate(lambda gates: check_codec(gates, vae, fine))
        tokens = stage(
            "extract tokens",
            lambda: run_extract_tokens(config, dataset, fine, coarse, output / "tokens", overwrite=True),
            lambda summary: f"{summary.manifest.rows} clips",
        ).folder
        ar = self._trained("ar", lambda: run_ar(config, dataset, tokens, vae, fine, output / "ar", self.tracking))
        self._gate(lambda gates: check_ar(gates, vae, fine, ar))
        parts = {
            "vae": vae,
            "codec_fine": fine,
            "codec_coarse": coarse,
            "ar": ar,
            **self._dits(dataset, tokens, vae, (fine, coarse)),
        }
        text = load_artifact(parts["ar"], "ar").lineage.parents["text"]
        return stage("bundle", lambda: save_bundle(output / "bundle", config, parts, text), lambda path: str(path.name))

    def _vae(self, videos: str) -> Path:
        if self.config.vae.train:
            return self._trained(
                "vae", lambda: run_vae(self.config, [(videos, 1.0)], self.output / "vae", self.tracking)
            )
        return vae_folder(None, self.config)

    def _codec(self, role: Role, dataset: Path, vae: Path) -> Path:
        if init := getattr(self.config.vqvae, role).init:
            return fitting_codec(init, role, vae)
        output = self.output / f"codec_{role}"
        return self._trained(f"vqvae {role}", lambda: run_codec(self.config, role, dataset, vae, output, self.tracking))

    def _dits(self, dataset: Path, tokens: Path, vae: Path, codecs: tuple[Path, Path]) -> dict[str, Path]:
        """The guided DiT, and the baseline: the text-only one that it starts from (`dit.base_steps` or `dit.init`)."""
        config, output, parts = self.config, self.output, {}
        if config.dit.base_steps:
            base = text_only(config, config.dit.base_steps)
            parts["dit_base"] = self._trained(
                "dit (text-only)",
                lambda: run_dit(base, dataset, vae, output / "dit_base", tracking=self.tracking),
            )
            dit = config.dit.model_copy(update={"init": str(parts["dit_base"])})
            config = config.model_copy(update={"dit": dit})
        elif config.dit.init and not (start := initial_dit(config.dit.init)).config["injection"]["enabled"]:
            parts["dit_base"] = start.path
        parts["dit"] = self._trained(
            "dit (guided)", lambda: run_dit(config, dataset, vae, output / "dit", tokens, codecs, self.tracking)
        )
        return parts

    def _gate(self, check: Callable[[Gates], None]) -> None:
        """Behind a stage that was trained just now, on footage whose truth is known. Raises GateError."""
        if self.source is None and self.trained_now:
            check(Gates(self.config))

    def _trained(self, name: str, work: Callable[[], StageOutcome]) -> Path:
        def figure(outcome: StageOutcome) -> str:
            metrics = "  ".join(f"{n} {v:.4g}" for n, v in outcome.artifact.lineage.metrics.items())
            return f"{'(there already)  ' if outcome.skipped else ''}{metrics}"

        outcome: StageOutcome = self.ledger.stage(name, work, figure)
        self.trained_now = not outcome.skipped
        return outcome.artifact.path

    def serve(self, bundle: Path) -> None:
        """Serve the bundle, ask it for a long video over HTTP, and save what comes back; unless that is there."""
        self.ledger.stage(
            "serve",
            lambda: serve_demo(self.config, bundle, self.output),
            lambda result: (
                f"{'(there already)  ' if result.skipped else ''}"
                f"{result.seconds_per_video:.1f} s for {result.frames} frames, AR share {result.ar_share:.0%}"
            ),
        )

    def next_commands(self, bundle: Path) -> str:
        """What to try next."""
        if mirror.origin(self.output):  # what serves it may be another machine
            where = mirror.named(str(bundle))
            return f"next:\n  python jobs/generate.py --bundle {where!r} --prompt {DEMO_PROMPTS[0]!r} --segments 6"
        here = Path(os.path.relpath(self.output))
        prompt = DEMO_PROMPTS[0]
        return "\n".join([
            f"video {here / 'demo.mp4'}   contact sheet {here / 'demo.png'}   baseline {here / 'baseline.mp4'}",
            "next:",
            f"  make serve BUNDLE={os.path.relpath(bundle)}        # then open the URL that it prints",
            f"  .venv/bin/python jobs/generate.py --bundle {os.path.relpath(bundle)} --prompt {prompt!r} --segments 6",
            f"  .venv/bin/mlflow ui --backend-store-uri {self.tracking.uri}",
            "  export RAY_AUTH_MODE=token; .venv/bin/ray start --head     # then, on that cluster:",
            "  .venv/bin/ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/pipeline.py",
        ])  # fmt: skip


def main() -> None:
    """Command line."""
    flags = parser("Raw video in, long video served: all stages, skipping what is done.", output="runs/tiny")
    flags.add_argument("--input", metavar="INPUT", help="your own captioned videos (default: renders a sample set)")
    arguments = flags.parse_args()
    config = read_config(arguments)
    source = collection(arguments.input, "--input") if arguments.input else None
    Pipeline(config, source, output_folder(arguments)).run()


if __name__ == "__main__":
    run(main)
