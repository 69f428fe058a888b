"""Numbers of the public models, to agree with: recorded inputs, weights and outputs of three forms.

`P_config.json` + `P_state.safetensors` + `P_io.safetensors`: one forward pass of STDiT3 or of the temporal VAE;
`Q_rflow_sample.json` + `Q_rflow_sample.safetensors`: a guided rectified-flow sample through the STDiT3 whose files
start with the same Q. Legend: B batch, L text tokens, T frames.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from arlon_ray.config import InjectionConfig, TemporalVaeConfig
from arlon_ray.diffusion.rectified_flow import latents_for_time, schedule, time_ratio
from arlon_ray.diffusion.solvers import sample_flow
from arlon_ray.generation.guidance import guided_velocity
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.models.dit import STDiT3
from arlon_ray.models.vae.temporal import TemporalVAE
from arlon_ray.opensora.importing import dit_config

#: Largest absolute errors that count as agreement.
FORWARD_TOLERANCE, SAMPLE_TOLERANCE = 1e-4, 1e-3
CONFIG, SAMPLE = "_config.json", "_rflow_sample.json"


@dataclass(frozen=True)
class Agreement:
    """How far our output is from the recorded one. `error` says why there is none."""

    fixture: str
    kind: str
    max_abs_error: float | None
    ok: bool
    error: str | None = None

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "error" or value is not None})


def check_fixtures(folder: Path, injection: bool = False) -> Iterator[Agreement]:
    """Compare every fixture in `folder` (and below), in the order of their names.

    With `injection` the DiT has it, untrained: the outputs must be the same.
    """
    settings = (_settings_of(file) for file in folder.rglob("*") if file.is_file())
    for path in sorted({path for path in settings if path is not None}):
        yield _compare(path, folder, injection)


def _settings_of(file: Path) -> Path | None:
    """The settings of the fixture that `file` is a part of, whether they are there or not."""
    for ending, settings in (("_state.safetensors", CONFIG), ("_io.safetensors", CONFIG),
                             ("_rflow_sample.safetensors", SAMPLE), (SAMPLE, SAMPLE)):  # fmt: skip
        if file.name.endswith(ending):
            return file.with_name(file.name.removesuffix(ending) + settings)
    # a configuration alone is a fixture that lost its tensors only if it is one of ours: others end alike
    if file.name.endswith(("_stdit3" + CONFIG, "_vae_temporal" + CONFIG)):
        return file
    return None


def _compare(path: Path, folder: Path, injection: bool) -> Agreement:
    sampled = path.name.endswith(SAMPLE)
    name = str(path.relative_to(folder)).removesuffix(".json" if sampled else CONFIG)
    kind, tolerance = "unknown", FORWARD_TOLERANCE
    check: Callable[[Path, dict[str, Any], bool], float]
    try:
        raw = json.loads(path.read_text())
        if sampled:
            kind, check, tolerance = "rflow_sample", _sample_error, SAMPLE_TOLERANCE
        elif "temporal_downsample" in raw:
            kind, check = "vae_temporal", _vae_error
        elif "hidden_size" in raw:
            kind, check = "stdit3", _stdit_error
        else:
            raise ValueError(f"{path.name}: neither STDiT3's settings nor the temporal VAE's")
        with torch.no_grad():
            error = check(path, raw, injection)
    except Exception as problem:  # whatever is wrong with one fixture, the others are still compared
        text = " ".join(f"{path.name}: {type(problem).__name__}: {problem}".split())
        return Agreement(name, kind, None, False, text[:500])
    if not math.isfinite(error):
        return Agreement(name, kind, None, False, f"{path.name}: our output is not finite where the recorded one is")
    return Agreement(name, kind, error, error <= tolerance)


def _stdit(stem: str, folder: Path, raw: dict[str, Any], injection: bool) -> STDiT3:
    config = dit_config(raw).model_copy(update={"injection": InjectionConfig(enabled=injection, width=16)})
    model = STDiT3(config).eval()
    state = load_file(folder / f"{stem}_state.safetensors")
    untrained = {name: value for name, value in model.state_dict().items() if name.startswith("injection.")}
    model.load_state_dict({**untrained, **state}, strict=True)
    return model


def _stdit_error(path: Path, raw: dict[str, Any], injection: bool) -> float:
    stem = path.name.removesuffix(CONFIG)
    model, io = _stdit(stem, path.parent, raw, injection), load_file(path.parent / f"{stem}_io.safetensors")
    text, mask = io["y"].flatten(0, 1), io["mask"].bool()
    size = (float(io["height"][0]), float(io["width"][0]))
    coarse = torch.randn(io["x"].shape, generator=torch.Generator().manual_seed(0)) if injection else None
    condition = model.condition(tuple(io["x"].shape[2:]), text, mask, io["fps"], size, coarse)  # type: ignore[arg-type]
    errors = [_distance(model(io["x"], io["timestep"], condition), io["out"])]
    if "out_x_mask" in io:
        masked = model(io["x"], io["timestep"], condition, io["x_mask"].bool())
        errors.append(_distance(masked, io["out_x_mask"]))
    return _largest(errors)


def _vae_error(path: Path, raw: dict[str, Any], injection: bool) -> float:
    stem = path.name.removesuffix(CONFIG)
    known = {name: raw[name] for name in TemporalVaeConfig.model_fields if name in raw}
    model = TemporalVAE(TemporalVaeConfig.model_validate(known)).eval()
    model.load_state_dict(load_file(path.parent / f"{stem}_state.safetensors"), strict=True)
    io = load_file(path.parent / f"{stem}_io.safetensors")
    posterior = model.encode(io["x"])
    recon = model.decode(posterior.mean, io["x"].shape[2])
    pairs = ((posterior.mean, io["mean"]), (posterior.log_variance, io["logvar"]), (recon, io["recon"]))
    return _largest([_distance(*pair) for pair in pairs])


def _sample_error(path: Path, raw: dict[str, Any], injection: bool) -> float:
    prefix = path.name.removesuffix(SAMPLE)
    stem = f"{prefix}_stdit3" if (path.parent / f"{prefix}_stdit3{CONFIG}").exists() else prefix
    settings = json.loads((path.parent / f"{stem}{CONFIG}").read_text())
    model, data = _stdit(stem, path.parent, settings, injection), load_file(path.with_suffix(".safetensors"))
    size = (raw["height"], raw["width"])
    times = schedule(raw["steps"], time_ratio(*size, latents_for_time(raw["num_frames"])))
    options = GenerationOptions(guidance_scale=raw["cfg_scale"], steps=raw["steps"])
    coarse = torch.randn(data["z"][:1].shape, generator=torch.Generator().manual_seed(0)) if injection else None
    errors = []
    for i, noise in enumerate(data["z"].split(1)):
        text = (data["y"].flatten(0, 1)[i : i + 1], data["mask"][i : i + 1].bool())
        grid: Any = tuple(noise.shape[2:])
        velocity = guided_velocity(model, grid, text, coarse, None, float(raw["fps"]), size, options)
        errors.append(_distance(sample_flow(velocity, noise, times), data["out"][i : i + 1]))
    return _largest(errors)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise ValueError(f"output {list(ours.shape)}, expected {list(theirs.shape)}")
    return float((ours.float() - theirs.float()).abs().max())


def _largest(errors: list[float]) -> float:
    """The largest error; one that is not a number counts as infinite."""
    return max(math.inf if math.isnan(error) else error for error in errors)
