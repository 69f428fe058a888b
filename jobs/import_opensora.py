"""Open-Sora v1.2's public weights: import them into artefacts and a bundle, or check that we compute what it computes.

`python jobs/import_opensora.py --stdit PATH|HUB --vae PATH|HUB --text PATH|HUB --output BUNDLE`, or any of the three
alone; `python jobs/import_opensora.py --check DIR`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from arlon_ray.artifact import LINEAGE, Artifact, whole_folder
from arlon_ray.bundle import MANIFEST, save_bundle
from arlon_ray.config import Config, DitConfig, override
from arlon_ray.models.text import text_identity
from arlon_ray.opensora.checkpoint import locate
from arlon_ray.opensora.fixtures import check_fixtures
from arlon_ray.opensora.importing import DIT_FIELDS, import_stdit, import_text, import_vae
from jobs.command_line import InputError, existing, parser, read_config, run


def import_parts(config: Config, sources: dict[str, Path], folder: Path) -> dict[str, Artifact]:
    """Import what `sources` ("vae", "text", "stdit") names into sub-folders of `folder`. Raises ArtifactError."""
    parts: dict[str, Artifact] = {}
    parents: dict[str, str] = {}
    if "vae" in sources:
        parts["vae"] = import_vae(sources["vae"], folder / "vae", config.vae)
        parents["vae"] = parts["vae"].fingerprint
    if "text" in sources:
        parts["text"] = import_text(sources["text"], folder / "text")
        parents["text"] = text_identity(text_settings(config, parts["text"]).text)
    if "stdit" in sources:
        parts["dit_base"] = import_stdit(sources["stdit"], folder / "dit_base", config.dit, parents)
    return parts


def text_settings(config: Config, text: Artifact) -> Config:
    """`config` with the imported text encoder."""
    settings = config.text.model_copy(update={"path": str(text.path), "dim": text.config["d_model"]})
    return config.model_copy(update={"text": settings})


def bundle_config(config: Config, parts: dict[str, Artifact]) -> Config:
    """`config` with the sizes of what was imported. Raises ConfigError if the parts do not fit each other."""
    dit = DitConfig.model_validate(parts["dit_base"].config)
    sizes = {name: getattr(dit, name) for name in DIT_FIELDS}
    # no AR comes with it
    changed = config.model_copy(
        update={
            "dit": config.dit.model_copy(update=sizes),
            "sampling": config.sampling.model_copy(update={"baseline": True}),
        }
    )
    return override(text_settings(changed, parts["text"]), [])


def check(folder: Path) -> int:
    """Print one line of JSON for each fixture; 0 only if all agree. Raises InputError if there is none."""
    failed = count = 0
    for agreement in check_fixtures(folder):
        print(agreement.line(), flush=True)
        count, failed = count + 1, failed + (not agreement.ok)
    if not count:
        raise InputError(f"--check {folder}: no fixture; expected *_config.json with *_state and *_io.safetensors")
    print(f"{count - failed} of {count} agree", file=sys.stderr)
    return 1 if failed else 0


def import_all(config: Config, sources: dict[str, Path], output: Path) -> None:
    """Write the parts, and with all three the bundle. `output` appears whole or not at all."""
    if len(sources) < 3:
        with whole_folder(output) as folder:
            parts = import_parts(config, sources, folder)
        for name, part in parts.items():
            print(f"{output / name}: {part.lineage.metrics['parameters']:,.0f} parameters")
        print(f"a bundle needs --stdit, --vae and --text together; {output} holds artefacts")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        parts = import_parts(config, sources, work)
        made = bundle_config(config, parts)
        paths = {name: part.path for name, part in parts.items() if name != "text"}
        save_bundle(output, made, paths, text_identity(made.text))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for name, part in parts.items():
        print(f"{output / name}: {part.lineage.metrics['parameters']:,.0f} parameters")
    print(f'{output}: text-only bundle; try python jobs/generate.py --bundle {output} --prompt "…"')


def check_output(output: Path, overwrite: bool) -> None:
    """Raises InputError if nothing can be written there, or something else would be replaced. Creates nothing."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; expected the name of a folder")
    above = next(folder for folder in output.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"--output {output}: {above} is not a folder that can be written to")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--output {output}: is there already; choose another, or --overwrite it")
    if not (output / MANIFEST).is_file() and not any(output.glob(f"*/{LINEAGE}")):
        raise InputError(f"--overwrite: {output} holds neither a bundle nor artefacts: it is left as it is")


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/opensora", default_config="opensora-v1.2")
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, what in (("stdit", "STDiT3"), ("vae", "the video VAE"), ("text", "T5")):
        flags.add_argument(f"--{name}", metavar="PATH|HUB", help=f"{what}: a file, a folder, or a hub name")
    flags.add_argument("--check", metavar="DIR", help="compare with every fixture in DIR; prints JSON lines")
    flags.add_argument("--overwrite", action="store_true", help="replace --output if it is there")
    arguments = flags.parse_args()
    named = {name: getattr(arguments, name) for name in ("stdit", "vae", "text")}
    named = {name: source for name, source in named.items() if source is not None}
    if arguments.check:
        if named:
            raise InputError("--check compares fixtures and imports nothing: leave --stdit, --vae and --text out")
        raise SystemExit(check(existing(arguments.check, "--check")))
    if not named:
        raise InputError("nothing to do: name --stdit, --vae or --text, or --check DIR")
    config = read_config(arguments)
    output = Path(arguments.output).expanduser().absolute()
    check_output(output, arguments.overwrite)
    import_all(config, {name: locate(source, f"--{name}") for name, source in named.items()}, output)


if __name__ == "__main__":
    run(main)
