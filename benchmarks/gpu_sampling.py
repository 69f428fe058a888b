"""Sampling on a GPU: steps of STDiT3-XL/2 beside Open-Sora's formulas, loading it, and whole videos of `small`.

Cases of `benchmarks.gpu`; all weights are random.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from arlon_ray.artifact import WEIGHTS, record
from arlon_ray.bundle import Bundle
from arlon_ray.config import Config, DitConfig, InjectionConfig, load_config
from arlon_ray.generation import Timeline, VideoGenerator, default_options
from arlon_ray.generation.guidance import guided_velocity
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.models.ar import ArTransformer
from arlon_ray.models.codec import LatentCodec
from arlon_ray.models.dit import STDiT3, load_dit
from arlon_ray.models.text import TextEmbedding
from arlon_ray.models.vae import build_vae
from arlon_ray.offload import Offload, Turns
from arlon_ray.precision import arithmetic
from arlon_ray.training.engine import compile_blocks
from benchmarks.gpu_training import clean
from benchmarks.machine import in_turns, synchronised
from benchmarks.plain_opensora import guided_step, naive_attention

#: Most that a velocity in float32 may differ from that of the plain formulas, relative to its size (root mean squares).
TOLERANCE = 1e-3
#: Tokens up to which the two are compared in float32 too.
MOST_FLOAT32 = 20_000
GUIDANCE, FPS = 7.0, 24.0
#: Joins are warped on the CPU by OpenCV, which a machine with torch alone has not.
WITHOUT_OPENCV: dict[str, Any] = {"seam_frames": 0}


def xl2(small: bool) -> DitConfig:
    """STDiT3-XL/2 with semantic injection; `small`: two layers of it."""
    config = DitConfig(injection=InjectionConfig(enabled=True, width=512))
    sizes = {"depth": 2, "hidden_size": 64, "num_heads": 4, "caption_channels": 32, "model_max_length": 12}
    return config.model_copy(update=sizes) if small else config


def randomised(dit: STDiT3) -> STDiT3:
    """The model with random weights everywhere: outputs that begin at zero would hide mistakes."""
    for name, parameter in dit.requires_grad_(False).named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            parameter.normal_(0, 0.02)
    return dit.eval()


def in_bf16(dit: STDiT3) -> STDiT3:
    """The model in bf16, but for the frequencies of its positions."""
    frequencies = dit.rope.freqs.detach().clone()
    dit.bfloat16().rope.freqs.data = frequencies
    return dit


def steps(size: tuple[int, int], latent_frames: int, small: bool, device: str, runs: int) -> dict[str, Any]:
    """Seconds of a step with text guidance, guided by tokens, of ours and of Open-Sora's formulas, in turns."""
    with clean(device), torch.no_grad():
        with torch.device(device):
            dit = randomised(STDiT3(xl2(small)))
        found: dict[str, Any] = {}
        shape = (latent_frames, size[0] // 8, size[1] // 8)
        if dit.token_count(shape) <= MOST_FLOAT32:
            found |= _equality(dit, shape, size, device)
        return found | _compared(in_bf16(dit), shape, size, device, runs)


Step = Callable[[Tensor, Tensor], Tensor]


def _works(
    dit: STDiT3, shape: tuple[int, int, int], size: tuple[int, int], device: str
) -> tuple[Callable[[], Step], dict[str, Callable[[], Tensor]]]:
    """What prepares a segment, and a step of each kind."""
    config = dit.config
    length = config.model_max_length
    text = torch.randn(1, length, config.caption_channels, device=device)
    mask = torch.arange(length, device=device)[None] < length // 3
    x, coarse = (torch.randn(1, config.in_channels, *shape, device=device) for _ in range(2))
    moment, options = torch.full((1,), 500.0, device=device), GenerationOptions(guidance_scale=GUIDANCE)

    def prepare() -> Callable[[Tensor, Tensor], Tensor]:
        return guided_velocity(dit, shape, (text, mask), coarse, None, FPS, size, options)

    velocity = prepare()
    plain = partial(guided_step, dit, x, moment, (text, mask), FPS, size, GUIDANCE, None, coarse)
    return prepare, {
        "plain, naive attention": partial(plain, naive_attention),
        "plain, fused attention": partial(plain, F.scaled_dot_product_attention),
        "ours": lambda: velocity(x, moment),
    }


def _equality(dit: STDiT3, shape: tuple[int, int, int], size: tuple[int, int], device: str) -> dict[str, Any]:
    """How far ours is from the plain formulas in float32."""
    _, works = _works(dit, shape, size, device)
    error = _difference(works["ours"](), works["plain, fused attention"]())
    return {"relative_error_float32": error, "equal": error < TOLERANCE}


def _compared(
    dit: STDiT3, shape: tuple[int, int, int], size: tuple[int, int], device: str, runs: int
) -> dict[str, Any]:
    prepare, works = _works(dit, shape, size, device)
    found: dict[str, Any] = {"tokens": dit.token_count(shape), "memory_gib": {}, "errors": {}}
    expected = works["plain, fused attention"]()
    for name in list(works):
        try:
            found["memory_gib"][name] = _memory(works[name], device)
        except torch.cuda.OutOfMemoryError as error:
            found["errors"][name] = f"out of memory: {str(error)[:120]}"
            del works[name]
            torch.cuda.empty_cache()
    found["relative_error_bf16"] = _difference(works["ours"](), expected)
    turns = {name: synchronised(work, device) for name, work in works.items()}
    found["step_s"] = in_turns({**turns, "ours, preparing a segment": synchronised(prepare, device)}, runs)
    if device == "cuda":
        found["compiled"] = _compiled(dit, works, expected, runs)
    return found


def _compiled(dit: STDiT3, works: dict[str, Callable[[], Tensor]], expected: Tensor, runs: int) -> dict[str, Any]:
    """The same step with compiled blocks, beside what was there before."""
    before = {name: work for name, work in works.items() if name != "ours"}
    name, work = next(iter(before.items()))
    begin = time.perf_counter()
    compile_blocks(dit)
    ours = synchronised(works["ours"], "cuda")
    ours()
    seconds = time.perf_counter() - begin
    turns = in_turns({name: synchronised(work, "cuda"), "ours, compiled": ours}, runs)
    return {"compile_s": seconds, "step_s": turns, "relative_error_bf16": _difference(works["ours"](), expected)}


def _memory(work: Callable[[], Any], device: str) -> float | None:
    """Most of the GPU's memory while it works, in GiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronised(work, device)()
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def write_random(config: DitConfig, folder: Path) -> int:
    """An artefact of random weights in bfloat16; returns its bytes."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in STDiT3(config).state_dict().items()}
    drawn = torch.randn(2**20).mul_(0.02).bfloat16()  # drawing a milliard numbers would take longer than all the rest

    def values(shape: torch.Size) -> Tensor:
        count = shape.numel()
        return drawn.repeat(-(-count // len(drawn)))[:count].view(shape)

    save_file({name: values(shape) for name, shape in shapes.items()}, folder / WEIGHTS)
    record(folder, kind="dit", config=config.model_dump(mode="json"))
    return (folder / WEIGHTS).stat().st_size


def loading(config: DitConfig, device: str) -> dict[str, Any]:
    """Seconds from an artefact on the disk (in its cache) to a DiT in bf16 on the device, sha256 included."""
    with clean(device), tempfile.TemporaryDirectory() as folder:
        size = write_random(config, Path(folder))
        synchronised(lambda: None, device)()
        begin = time.perf_counter()
        dit = load_dit(folder, device, torch.bfloat16)
        synchronised(lambda: None, device)()
        return {
            "load_s": time.perf_counter() - begin,
            "file_gib": size / 2**30,
            "parameters": sum(parameter.numel() for parameter in dit.parameters()),
        }


class RandomText:
    """Stands where a text encoder does: what captions mean does not matter to the time that a video takes."""

    def __init__(self, config: Config, device: str) -> None:
        self.config, self.device = config.text, device

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """Ten tokens each."""
        values = torch.randn(len(captions), self.config.max_tokens, self.config.dim, device=self.device)
        mask = torch.arange(self.config.max_tokens, device=self.device) < 10
        return TextEmbedding(values, mask.expand(len(captions), -1))


def random_bundle(config: Config, device: str, offload: Offload = "none") -> Bundle:
    """A bundle of models with random weights that lie on no disk."""
    dtype = arithmetic(config.precision, device)
    channels = config.vae.latent_channels
    with torch.device(device):
        vae, codec = build_vae(config.vae), LatentCodec(config.vqvae.fine, channels)
        ar = ArTransformer(
            config.ar,
            codebook_size=config.vqvae.fine.codebook_size,
            text_dim=config.text.dim,
            max_text=config.text.max_tokens,
        )
        dit = STDiT3(config.dit)
    frequencies = dit.rope.freqs.detach().clone()
    models = {"vae": vae, "codec": codec, "ar": ar.to(dtype), "dit": dit.to(dtype)}
    dit.rope.freqs.data = frequencies
    bundle = Bundle.__new__(Bundle)
    bundle.config, bundle.device, bundle.path = config, torch.device(device), Path("random")
    bundle.artifacts = {"dit": None}  # type: ignore[dict-item]
    bundle.offload, bundle.turns = offload, Turns(bundle.device)
    parts: dict[str, Any] = {name: model.eval().requires_grad_(False) for name, model in models.items()}
    if bundle.offloads_idle:
        for name in ("vae", "ar", "dit"):
            bundle.turns.waits(parts[name].cpu())
    vars(bundle).update(parts, baseline=parts["dit"], text=RandomText(config, device))
    return bundle


def whole_videos(
    preset: str, overrides: Sequence[str], segments: int, few: int, many: int, device: str, runs: int
) -> dict[str, Any]:
    """Videos of a preset: text alone with `many` steps, guided by the AR's tokens with `few`, in turns."""
    with clean(device):
        config = load_config(preset, overrides)
        generator = VideoGenerator(random_bundle(config, device))
        prompts, shares = [f"a red circle moves, part {i}" for i in range(segments)], {}

        def make(name: str, **changes: Any) -> None:
            timeline, begin = Timeline(), time.perf_counter()
            options = default_options(config.sampling, **WITHOUT_OPENCV, **changes)
            for _ in generator.generate(prompts, 0, options, timeline=timeline):
                pass
            whole = time.perf_counter() - begin
            shares[name] = {part: sum(timeline.seconds(part)) / whole for part in ("ar", "dit", "decoder")}

        names = {f"text-only@{many}": {"steps": many, "baseline": True}, f"guided@{few}": {"steps": few}}
        works = {name: synchronised(partial(make, name, **changes), device) for name, changes in names.items()}
        seconds = in_turns(works, runs)
        return {
            "segments": segments,
            "parameters": sum(p.numel() for p in generator.bundle.dit.parameters()),
            "video_s": seconds,
            "busy_shares": shares,  # the stages work side by side: together more than 1
        }
