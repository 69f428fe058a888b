"""Search settings of one stage with Ray Tune: `python jobs/tune.py --stage dit --space space.yaml --dataset DIR …`.

The space is YAML, one line a setting, in the words of Ray Tune:

    dit.training.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}
    dit.training.optimizer: {choice: [adamw, muon]}
    dit.injection.width: {choice: [64, 128]}

Every trial trains the stage as `jobs/train_*.py` would, with its own workers, and is a run in MLflow under that of the
search. `trials.json` has all of them, the best first; run again, the search goes on with the trials that are missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from arlon_ray.artifact import write_json
from arlon_ray.config import Config, ConfigError, config_fingerprint, override
from arlon_ray.training.loop import TrainingError
from arlon_ray.training.memory import training_of
from arlon_ray.training.reporting import QuietReporter
from data_pipeline.manifest import settings_key
from jobs.command_line import InputError, existing, output_folder, parser, read_config, run, vae_folder
from jobs.holding import alone
from jobs.ray_session import connect
from jobs.stage_runs import Role, StageOutcome, run_ar, run_codec, run_dit
from jobs.tracking import Tracking, tracking_uri

STAGES = ("vqvae_fine", "vqvae_coarse", "ar", "dit")
#: What a setting of the space may be drawn by; each is a function of `ray.tune`.
DRAWN_BY = ("choice", "uniform", "loguniform", "quniform", "qloguniform", "randint", "lograndint", "grid_search")
RESULTS = "trials.json"


class TuneReporter(QuietReporter):
    """Tells Ray Tune of a trial's losses, so that a scheduler can end it early."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See Reporter."""
        from ray import tune

        if "step_s" in values:
            tune.report({"step": step, "training_loss": values["loss"]})


def read_space(path: Path, config: Config) -> dict[str, dict[str, list[Any]]]:
    """{setting: {how: arguments}}. Raises InputError for what is not a space, or does not fit the configuration."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--space {path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not raw:
        raise InputError(f"--space {path}: expected lines such as dit.training.steps: {{choice: [200, 400]}}")
    for name, drawn in raw.items():
        if not isinstance(drawn, dict) or len(drawn) != 1 or not set(drawn) <= set(DRAWN_BY):
            raise InputError(f"--space {path}: {name}: expected one of {', '.join(DRAWN_BY)} with its arguments")
        ((how, arguments),) = drawn.items()
        if not isinstance(arguments, list) or not arguments:
            raise InputError(f"--space {path}: {name}: {how}: expected a list")
        try:
            override(config, [f"{name}={json.dumps(arguments[0])}"])
            drawn_from(how, arguments)
        except (ConfigError, TypeError, ValueError) as error:
            raise InputError(f"--space {path}: {name}: {how}: {' '.join(str(error).split())}") from None
    return raw


def drawn_from(how: str, arguments: list[Any]) -> Any:
    """Ray Tune's own object. Raises TypeError or ValueError for arguments that it does not take."""
    from ray import tune

    function = getattr(tune, how)
    return function(arguments) if how in ("choice", "grid_search") else function(*arguments)


def train_trial(
    settings: dict[str, Any], stage: str, config: Config, paths: dict[str, Path], output: Path, parent: str | None
) -> dict[str, Any]:
    """One trial, in Ray Tune's process for it: the figures of its artefact."""
    there = override(config, [f"{name}={json.dumps(value)}" for name, value in settings.items()])
    folder = output / f"trial-{settings_key(settings)[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    tracking = Tracking(override(there, [f"tracking.uri={tracking_uri(config, output)}"]), folder)
    tracking.parent_run = parent
    outcome = _train(stage, there, paths, folder / stage, tracking)
    figures = outcome.artifact.lineage.metrics
    return {**figures, "artifact": str(outcome.artifact.path), "fingerprint": outcome.artifact.fingerprint}


def _train(stage: str, config: Config, paths: dict[str, Path], output: Path, tracking: Tracking) -> StageOutcome:
    dataset, vae, reporters = paths["dataset"], paths["vae"], [TuneReporter()]
    if stage.startswith("vqvae"):
        role = cast(Role, stage.removeprefix("vqvae_"))
        return run_codec(config, role, dataset, vae, output, tracking, reporters=reporters)
    tokens = paths.get("tokens")
    if stage == "ar":
        return run_ar(config, dataset, paths["tokens"], vae, paths["codec_fine"], output, tracking, reporters=reporters)
    codecs = (paths["codec_fine"], paths["codec_coarse"]) if tokens else None
    return run_dit(config, dataset, vae, output, tokens, codecs, tracking, reporters=reporters)


def search(
    config: Config,
    stage: str,
    space: dict[str, dict[str, list[Any]]],
    paths: dict[str, Path],
    output: Path,
    *,
    trials: int,
    at_once: int,
    metric: str,
    early: bool,
) -> list[dict[str, Any]]:
    """All trials, the best first, those that broke last with their error. Raises TrainingError if all broke."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    tracking = Tracking(config, output)
    key = settings_key({"stage": stage, "space": space, "config": config_fingerprint(config), "trials": trials})

    with tracking.pipeline(f"tune {stage}", key=key) as parent:

        def trial(settings: dict[str, Any]) -> None:
            tune.report({**train_trial(settings, stage, config, paths, output, parent.run_id), "finished": True})

        steps = training_of(config, stage).steps
        scheduler = ASHAScheduler("step", "training_loss", "min", max_t=steps, grace_period=max(1, steps // 4))
        trainable = tune.with_resources(trial, {"CPU": 0.01})
        drawn = {name: drawn_from(*next(iter(words.items()))) for name, words in space.items()}
        there = output / ".tune" / f"search-{key[:16]}"
        if tune.Tuner.can_restore(str(there)):
            tuner = tune.Tuner.restore(str(there), trainable, restart_errored=True, param_space=drawn)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=drawn,
                tune_config=tune.TuneConfig(
                    num_samples=trials, max_concurrent_trials=at_once, scheduler=scheduler if early else None
                ),
                run_config=tune.RunConfig(name=there.name, storage_path=str(there.parent), verbose=0),
            )
        results = tuner.fit()
        found = [_summary(results[number], metric) for number in range(len(results))]
        found.sort(key=lambda row: (row["error"] is not None, row.get("value") is None, row.get("value") or 0.0))
        write_json(output / RESULTS, {"metric": metric, "trials": found})
        if all(row["error"] for row in found):
            raise TrainingError(f"tune {stage}: no trial came to its end; the first: {found[0]['error']}")
        return found


def _summary(result: Any, metric: str) -> dict[str, Any]:
    metrics = result.metrics or {}
    row: dict[str, Any] = {"settings": result.config, "steps": metrics.get("step"), "error": None}
    if result.error is not None:
        row["error"] = str(result.error).strip().splitlines()[-1]
    elif metrics.get("finished") and metric not in metrics:
        row["error"] = f"its artefact has no figure {metric}"
    elif metrics.get("finished"):
        row |= {"value": metrics[metric], "artifact": metrics["artifact"]}
    return row


def _paths(arguments: argparse.Namespace, config: Config) -> dict[str, Path]:
    """What the stage needs. Raises InputError where a flag is missing."""
    stage, dataset = arguments.stage, existing(arguments.dataset, "--dataset")
    paths = {"dataset": dataset, "vae": vae_folder(arguments.vae, config)}
    guided = stage == "dit" and config.dit.injection.enabled
    needed = ["codec_fine"] if stage == "ar" else ["codec_fine", "codec_coarse"] if guided else []
    for name in needed:
        flag = f"--{name.replace('_', '-')}"
        if not getattr(arguments, name):
            raise InputError(f"--stage {stage} needs {flag}")
        paths[name] = existing(getattr(arguments, name), flag)
    if needed:
        paths["tokens"] = existing(arguments.tokens or str(dataset / "tokens"), "--tokens")
    return paths


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/tune")
    flags.add_argument("--stage", required=True, choices=STAGES)
    flags.add_argument("--space", required=True, metavar="FILE", help="YAML: settings and how they are drawn")
    flags.add_argument("--dataset", required=True, metavar="DIR", help="latents, by jobs/preprocess.py")
    flags.add_argument("--tokens", metavar="DIR", help="tokens, by jobs/extract_tokens.py (default: DATASET/tokens)")
    flags.add_argument("--codec-fine", metavar="DIR", help="the codec that made the fine tokens")
    flags.add_argument("--codec-coarse", metavar="DIR", help="the codec that made the coarse tokens")
    flags.add_argument("--vae", metavar="DIR", help="VAE artefact (default: vae.init)")
    flags.add_argument("--trials", type=int, default=8, help="how many (default: 8); for each point of a grid_search")
    flags.add_argument("--at-once", type=int, default=1, help="trials that run at the same time (default: 1)")
    flags.add_argument("--metric", default="loss", help="held-out figure of the artefact, the smaller the better")
    flags.add_argument("--early-stopping", action="store_true", help="end trials that fall behind (ASHA)")
    arguments = flags.parse_args()
    if arguments.trials < 1 or arguments.at_once < 1:
        raise InputError(f"--trials {arguments.trials} --at-once {arguments.at_once}: expected at least 1")
    config = read_config(arguments)
    space = read_space(existing(arguments.space, "--space"), config)
    paths, output = _paths(arguments, config), output_folder(arguments)
    with alone(config, output, "tune"), connect(config):
        found = search(
            config,
            arguments.stage,
            space,
            paths,
            output,
            trials=arguments.trials,
            at_once=arguments.at_once,
            metric=arguments.metric,
            early=arguments.early_stopping,
        )
    for row in found:
        settings = "  ".join(f"{name}={value}" for name, value in row["settings"].items())
        outcome = row["error"] or (f"{arguments.metric} {row['value']:.4g}" if "value" in row else "ended early")
        print(f"{outcome}  {settings}")
    print(f"{output / RESULTS}")


if __name__ == "__main__":
    run(main)
