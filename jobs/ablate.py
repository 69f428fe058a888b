"""Train variants of the method from one bundle, measure them all, and write the table.

`python jobs/ablate.py --bundle DIR --dataset DIR --tokens DIR --steps 500 --output runs/ablation`

Every DiT starts from the bundle's text-only one and gets the same steps, data and seed; every AR starts anew. A variant
that is there already is not trained again. `--trained DIR` trains nothing: it measures variants that
`benchmarks/train_box.py` made of the same bundle. `--docs FILE` writes table, plot and pictures beside a page.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arlon_ray.artifact import Artifact, load_artifact
from arlon_ray.bundle import PARTS, Bundle, save_bundle
from arlon_ray.config import Config, override
from jobs.command_line import InputError, existing, output_folder, parser, run
from jobs.evaluate import beside, costs, evaluate, parse_choices, tuned, write_results
from jobs.evaluation import Evaluator, held_out_prompts, parse_row, table_of
from jobs.generate import open_bundle
from jobs.ray_session import connect
from jobs.results_page import read_results, write_page
from jobs.stage_runs import run_ar, run_dit
from jobs.tracking import Tracking
from jobs.variants import NAMES, VARIANTS, Variant


@dataclass(frozen=True)
class Ablation:
    """What all variants share."""

    bundle: Bundle
    output: Path
    steps: int
    ar_steps: int
    tracking: Tracking
    dataset: Path | None = None
    tokens: Path | None = None
    trained: Path | None = None

    def config(self, variant: Variant) -> Config:
        """The bundle's configuration with the variant's overrides, its steps, and the common start."""
        common = [
            "dit.base_steps=0", "dit.train_only=all", f"dit.training.steps={self.steps}",
            f"dit.init={self.bundle.path / PARTS['dit_base'][0]}",
            "ar.init=null", f"ar.training.steps={self.ar_steps}",
        ]  # fmt: skip
        return override(self.bundle.config, [*common, *variant.overrides])

    def part(self, name: str) -> Path:
        """A part of the bundle."""
        return self.bundle.path / PARTS[name][0]

    def train(self, variant: Variant) -> Artifact:
        """The variant's own part, trained where it is not there. Raises ArtifactError if it should be and is not."""
        if self.trained is not None:
            return load_artifact(self.trained / variant.name / variant.stage, variant.stage)
        assert self.dataset is not None and self.tokens is not None
        config, folder = self.config(variant), self.output / "models" / variant.name
        vae = self.part("vae")
        if variant.stage == "ar":
            fine = self.part("codec_fine")
            return run_ar(config, self.dataset, self.tokens, vae, fine, folder, self.tracking).artifact
        codecs = (self.part("codec_fine"), self.part("codec_coarse"))
        given = self.part("ar")
        return run_dit(config, self.dataset, vae, folder, self.tokens, codecs, self.tracking, given).artifact

    def bundled(self, variant: Variant, trained: Path) -> Bundle:
        """The bundle with the variant's part in place of its own."""
        role = "dit_base" if variant.name == "text-only" else variant.stage
        parts = {name: artifact.path for name, artifact in self.bundle.artifacts.items()} | {role: trained}
        path = self.output / "bundles" / variant.name
        if path.exists():
            shutil.rmtree(path)
        return Bundle(save_bundle(path, self.config(variant), parts, self.bundle.text_identity))


def measure_variant(
    ablation: Ablation, variant: Variant, count: int, choices: dict[str, list[float]], tune_count: int, seed: int
) -> bool:
    """Train (or find) one variant and measure its rows; whether nothing failed."""
    artifact = ablation.train(variant)
    bundle = ablation.bundled(variant, artifact.path)
    output = ablation.output / variant.name
    output.mkdir(parents=True, exist_ok=True)
    rows, scores = tuned(bundle, [parse_row(text) for text in variant.rows], choices, tune_count, seed)
    evaluator = Evaluator(bundle, held_out_prompts(bundle, count), seed)
    results = evaluate(evaluator, rows, output, label=variant.name, tracking=ablation.tracking)
    facts = {"variant": variant.name, "what": variant.what, "loss": artifact.lineage.metrics.get("loss")}
    more = facts | scores | beside(evaluator, costs)
    write_results(output, evaluator, results, **more)
    print(f"\n{variant.name}: {variant.what}\n\n{table_of(results)}\n", flush=True)
    return "failures" not in more and not any(result.failures for result in results)


def chosen_variants(names: Sequence[str]) -> list[Variant]:
    """Raises InputError for a name that is none."""
    if unknown := [name for name in names if name not in NAMES]:
        raise InputError(f"--variants {unknown[0]}: expected some of {', '.join(NAMES)}")
    return [variant for variant in VARIANTS if variant.name in names]


def check(bundle: Bundle, variants: Sequence[Variant]) -> None:
    """Raises InputError for a bundle that has not all that is compared."""
    base = ("dit_base",) if any(variant.stage == "dit" for variant in variants) else ()
    for name in ("ar", "dit", *base):
        if name not in bundle.artifacts:
            raise InputError(
                f"--bundle {bundle.path}: has no {name}: expected a guided one, with its base for variants of the DiT"
            )


def trained_on(dataset: str | None, tokens: str | None) -> tuple[Path, Path]:
    """The folders to train on. Raises InputError where one is missing or none."""
    found = []
    for flag, text in (("--dataset", dataset), ("--tokens", tokens)):
        if text is None:
            raise InputError(f"{flag} is missing: expected what to train on, or --trained")
        folder = existing(text, flag)
        if not (folder / "manifest.json").is_file():
            raise InputError(f"{flag} {folder}: no manifest.json in it")
        found.append(folder)
    return found[0], found[1]


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/ablation", config=False)
    flags.add_argument("--bundle", required=True, metavar="DIR", help="guided bundle with its text-only base")
    flags.add_argument("--dataset", metavar="DIR", help="latents, by jobs/preprocess.py")
    flags.add_argument("--tokens", metavar="DIR", help="tokens, by jobs/extract_tokens.py")
    flags.add_argument("--trained", metavar="DIR", help="variants, by benchmarks/train_box.py: nothing is trained here")
    flags.add_argument("--variants", nargs="+", default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    flags.add_argument("--steps", type=int, default=500, help="training steps of every DiT (default: 500)")
    flags.add_argument("--ar-steps", type=int, default=500, help="training steps of every AR (default: 500)")
    flags.add_argument("--count", type=int, default=64, help="held-out captions (default: 64)")
    flags.add_argument("--tune", action="append", default=[], metavar="OPTION=V,V", help="as for evaluate.py")
    flags.add_argument("--tune-count", type=int, default=64, help="captions to choose on (default: 64)")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument(
        "--also", nargs="+", default=[], metavar="DIR", help="results of evaluate.py to show before the variants"
    )
    flags.add_argument("--train-only", action="store_true", help="train the variants; the same command measures later")
    flags.add_argument("--docs", metavar="FILE", help="page to write, its pictures in a folder beside it")
    arguments = flags.parse_args()
    for name in ("steps", "ar_steps", "count", "tune_count"):
        if (value := getattr(arguments, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    also = [read_results(existing(path, "--also")) for path in arguments.also]
    variants, choices = chosen_variants(arguments.variants), parse_choices(arguments.tune)
    bundle = open_bundle(existing(arguments.bundle, "--bundle"))
    check(bundle, variants)
    trained = existing(arguments.trained, "--trained") if arguments.trained else None
    dataset, tokens = (None, None) if trained else trained_on(arguments.dataset, arguments.tokens)
    output = output_folder(arguments)
    ablation = Ablation(
        bundle, output, arguments.steps, arguments.ar_steps, Tracking(bundle.config, output), dataset, tokens, trained
    )
    failed = False
    with connect(bundle.config):
        if arguments.train_only:
            for variant in variants:
                print(ablation.train(variant).path, flush=True)
            return
        for variant in variants:
            failed |= not measure_variant(
                ablation, variant, arguments.count, choices, arguments.tune_count, arguments.seed
            )
    page = Path(arguments.docs).expanduser().absolute() if arguments.docs else output / "results.md"
    told = f"`jobs/ablate.py`: every DiT has one text-only start, {arguments.steps} steps, the same data and seed."
    folders = [output / name for name in NAMES if (output / name / "results.json").is_file()]
    write_page(page, [*also, *map(read_results, folders)], told)
    print(page)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
