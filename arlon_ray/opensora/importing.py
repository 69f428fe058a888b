"""Public weights to artefacts: STDiT3, the video VAE and the T5 encoder, tensor by tensor.

Models are built on the meta device to know what is expected; everything is checked before anything is written, and
what is written streams from the source: memory holds one tensor at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from arlon_ray.artifact import WEIGHTS, Artifact, ArtifactError, one_line, record, sha256_of, whole_folder
from arlon_ray.config import DitConfig, InjectionConfig, VaeConfig
from arlon_ray.models.dit import STDiT3
from arlon_ray.models.vae import build_vae
from arlon_ray.opensora.checkpoint import DTYPES, Checkpoint

#: Fields of STDiT3's public config.json that say what the model is; the others say how it was run or trained.
DIT_FIELDS = ("depth", "hidden_size", "num_heads", "in_channels", "caption_channels", "model_max_length", "patch_size",
              "mlp_ratio", "qk_norm", "pred_sigma", "input_sq_size")  # fmt: skip
#: Switches of the public model that change its formulas, and the value that ours computes.
DIT_SWITCHES = {"qk_norm_legacy": False, "skip_y_embedder": False}
#: What Open-Sora v1.2 sets in its VAE when it is loaded (`OpenSoraVAE_V1_2`).
V1_2 = {"shift": (-0.10, 0.34, 0.27, 0.98), "scale": (3.85, 2.32, 2.33, 3.06)}
#: Attention names of the spatial VAE before diffusers 0.18.
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")  # fmt: skip


class Source(NamedTuple):
    """The public tensor that one of ours is made of."""

    name: str
    convert: Callable[[Tensor], Tensor] = lambda value: value


def dit_config(public: Mapping[str, Any]) -> DitConfig:
    """Our configuration, without injection, of a public STDiT3 config.json. Raises ArtifactError."""
    for name, ours in DIT_SWITCHES.items():
        if public.get(name, ours) != ours:
            raise ArtifactError(f"config.json: {name}={public[name]}: expected {ours}; that variant is another model")
    known = {name: public[name] for name in DIT_FIELDS if name in public}
    try:
        return DitConfig.model_validate({**known, "injection": InjectionConfig(enabled=False)})
    except ValidationError as error:
        raise ArtifactError(f"config.json: {one_line(error)}") from None


def import_stdit(source: Path, output: Path, fallback: DitConfig, parents: Mapping[str, str]) -> Artifact:
    """Write the DiT artefact `output` of a public STDiT3. `fallback` says its sizes where there is no config.json.

    Raises ArtifactError that names the tensor, what was found and what was expected.
    """
    checkpoint = Checkpoint(source)
    try:
        config = dit_config(checkpoint.config or fallback.model_dump(mode="json"))
    except ArtifactError as error:
        raise ArtifactError(f"{source}: {error}") from None
    with torch.device("meta"):
        expected = _shapes(STDiT3(config))
    sources = {name: Source(name) for name in expected}
    settings = config.model_dump(mode="json")
    return _write(checkpoint, expected, sources, output, kind="dit", config=settings, parents=parents)


def import_vae(source: Path, output: Path, config: VaeConfig) -> Artifact:
    """Write the VAE artefact `output` of Open-Sora's `VideoAutoencoderPipeline`. Raises ArtifactError."""
    if config.kind != "opensora":
        raise ArtifactError(f"vae.kind={config.kind}: --vae needs a configuration with vae.kind=opensora")
    checkpoint = Checkpoint(source)
    public = checkpoint.config
    if public.get("micro_frame_size") not in (None, 17):
        raise ArtifactError(f"{source}: config.json: micro_frame_size={public['micro_frame_size']}: expected 17")
    with torch.device("meta"):
        expected = _shapes(build_vae(config))
    sources = {name: _vae_source(name, checkpoint) for name in expected}
    # where the weights do not hold them, the public loader sets them itself, whatever config.json says
    constants = {name: torch.tensor(value) for name, value in V1_2.items() if name not in checkpoint.tensors}
    settings = config.model_copy(update={"init": None}).model_dump(mode="json")
    return _write(checkpoint, expected, sources, output, kind="vae", config=settings, constants=constants)


def import_text(source: Path, output: Path) -> Artifact:
    """Write the text artefact `output`: the encoder's half of a T5 and its tokenizer. Raises ArtifactError."""
    from transformers import T5Config, T5EncoderModel

    checkpoint = Checkpoint(source)
    public = checkpoint.config
    if public.get("model_type") != "t5":
        raise ArtifactError(f"{source}: config.json says model_type={public.get('model_type')!r}: expected 't5'")
    folder = source if source.is_dir() else source.parent
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {"spiece.model", "tokenizer.json"} & {file.name for file in tokenizer}:
        raise ArtifactError(f"{source}: no tokenizer: expected spiece.model or tokenizer.json beside the weights")
    with torch.device("meta"):
        expected = _shapes(T5EncoderModel(T5Config.from_dict(public)))
    tied = "encoder.embed_tokens.weight"
    del expected[tied]  # the same tensor as shared.weight
    shared = "shared.weight" if "shared.weight" in checkpoint.tensors else tied
    sources = {name: Source(shared if name == "shared.weight" else name) for name in expected}
    ignored = ("decoder.", "lm_head.", tied)
    settings = {**public, "architectures": ["T5EncoderModel"]}
    return _write(checkpoint, expected, sources, output, kind="text", config=settings, ignored=ignored, files=tokenizer)


def _vae_source(name: str, checkpoint: Checkpoint) -> Source:
    if name in ("shift", "scale"):
        return Source(name, lambda value: value.float().flatten())
    public = (
        name.replace("spatial.", "spatial_vae.module.", 1)
        if name.startswith("spatial.")
        else f"temporal_vae.{name[9:]}"
    )
    if public in checkpoint.tensors:
        return Source(public)
    for new, old in OLD_ATTENTION.items():
        renamed = public.replace(f".{new}.", f".{old}.")
        if renamed in checkpoint.tensors:
            return Source(renamed, lambda value: value.flatten(1) if value.ndim == 4 else value)
    return Source(public)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _write(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Source],
    output: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str] | None = None,
    constants: Mapping[str, Tensor] | None = None,
    ignored: tuple[str, ...] = (),
    files: list[Path] | None = None,
) -> Artifact:
    """Check all of it, then write it; `constants` are tensors that the checkpoint does not hold."""
    constants = constants or {}
    taken = {name: source for name, source in sources.items() if name not in constants}
    _check(checkpoint, expected, taken, constants, ignored)
    hashes = {f"source:{file.name}": sha256_of(file) for file in checkpoint.files}
    metrics = {"parameters": sum(torch.Size(shape).numel() for shape in expected.values())}
    with whole_folder(output) as folder:
        _stream(checkpoint, expected, taken, constants, folder / WEIGHTS)
        for file in files or []:
            shutil.copy2(file, folder / file.name)
        lineage = record(folder, kind=kind, config=config, parents={**(parents or {}), **hashes}, metrics=metrics)
    return Artifact(output, dict(config), lineage)


def _check(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Source],
    constants: Mapping[str, Tensor],
    ignored: tuple[str, ...],
) -> None:
    """Every tensor that we need, of its shape, and none that we do not know. Raises ArtifactError."""
    found = checkpoint.tensors
    missing = [source.name for source in sources.values() if source.name not in found]
    if missing:
        raise ArtifactError(f"{checkpoint.path}: tensor {missing[0]} is missing{_more(missing)}")
    used = {source.name for source in sources.values()}
    unexpected = [name for name in found if name not in used and not name.startswith(ignored or ("\0",))]
    if unexpected:
        its = list(found[unexpected[0]].shape)
        raise ArtifactError(
            f"{checkpoint.path}: tensor {unexpected[0]} {its} is not expected{_more(unexpected)}: another model?"
        )
    for name, shape in expected.items():
        if name in constants:
            its = list(constants[name].shape)
        else:
            its = list(sources[name].convert(torch.empty(found[sources[name].name].shape, device="meta")).shape)
        if its != list(shape):
            where = sources[name].name if name in sources else name
            raise ArtifactError(f"{checkpoint.path}: tensor {where}: found {its}, expected {list(shape)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _stream(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Source],
    constants: Mapping[str, Tensor],
    path: Path,
) -> None:
    """Write a safetensors file (8 bytes of length, a JSON header, the data) with one tensor in memory at a time.

    safetensors' own writer wants all tensors at once. File after file, so that each is opened but once.
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    names = sorted(
        shapes, key=lambda name: ("" if name in constants else str(checkpoint.tensors[sources[name].name].file), name)
    )
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        dtype = constants[name].dtype if name in constants else _dtype(checkpoint, sources[name])
        start, end = end, end + torch.Size(shapes[name]).numel() * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = constants[name] if name in constants else sources[name].convert(checkpoint.read(sources[name].name))
            file.write(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)


def _dtype(checkpoint: Checkpoint, source: Source) -> torch.dtype:
    stored = checkpoint.tensors[source.name].dtype
    return source.convert(torch.empty(checkpoint.tensors[source.name].shape, dtype=stored, device="meta")).dtype
