"""Training of the DiT: rectified flow, guided by tokens of the fine and of the coarse codec, with parts left out.

Coarser tokens and perturbed feature statistics make it tolerant of the AR's errors (ARLON); text and tokens are dropped
independently, for guidance; the first groups of some samples are given, for long video (`x_mask` of Open-Sora v1.2),
and so are the frames that belong to an earlier caption.
With `dit.injection.enabled=false` this is the text-only baseline, by the same code.

Legend: B batch, C latent channels, t×h×w latent grid of one segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.artifact import LINEAGE, Artifact, ArtifactError, load_artifact, save_artifact
from arlon_ray.bundle import MANIFEST, PARTS
from arlon_ray.config import GROUP_LATENTS, Config
from arlon_ray.diffusion.frame_masks import sample_noisy
from arlon_ray.diffusion.rectified_flow import NUM_TIMES, add_noise, sample_times, schedule, time_ratio
from arlon_ray.diffusion.solvers import sample_flow
from arlon_ray.generation.guidance import guided_velocity
from arlon_ray.generation.options import default_options
from arlon_ray.models.ar import load_ar
from arlon_ray.models.codec import load_codec
from arlon_ray.models.dit import Condition, STDiT3
from arlon_ray.models.injection import Modulation
from arlon_ray.training.engine import Evaluation, Losses
from arlon_ray.training.pictures import comparison
from arlon_ray.training.stages.latents import BatchSource, cut, group_window, is_given, look, on_held_out, trimmed

PICTURED = 4


@dataclass(frozen=True)
class DitPaths:
    """Artefacts that the stage needs; the codecs are None for the text-only baseline, `ar` without its tokens."""

    vae: Path
    codec_fine: Path | None = None
    codec_coarse: Path | None = None
    ar: Path | None = None


class DitObjective(nn.Module):
    """Mean squared error of the velocity over the frames that carry noise."""

    def __init__(self, config: Config, paths: DitPaths) -> None:
        super().__init__()
        self.config = config
        self.dit = STDiT3(config.dit)
        self.fine, self.coarse = (load_codec(path) if path else None for path in (paths.codec_fine, paths.codec_coarse))
        self.ar = load_ar(paths.ar) if paths.ar else None

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
        """Squared error of the velocity at drawn times, over frames that carry noise; the gates as figures."""
        x0, tokens, given = self._segment(batch, generator)
        count, _, frames = x0.shape[:3]
        anchor = self._anchor(batch, generator)
        x0 = torch.cat([anchor, x0], 2)
        device, settings, video = x0.device, self.config.dit, self.config.video

        def chosen(probability: float) -> Tensor:
            return torch.rand(count, generator=generator, device=device) < probability

        text, text_mask = trimmed(batch)
        # a mask that masks nothing would keep the fastest kernels of attention from being used
        real = None if bool(text_mask.all()) else text_mask
        if tokens and self.ar is not None and self.training:
            tokens = self._drawn_by_ar(tokens, text, text_mask, chosen(settings.ar_token_probability), generator)
        null = self.dit.y_embedder.y_embedding[: text.shape[1]]
        silent = chosen(settings.text_dropout)
        text = torch.where(silent[:, None, None], null, text)
        size = (video.height, video.width)
        guide = None
        if tokens:  # that of the anchor is itself
            guide = torch.cat([anchor, self.guide(tokens, chosen(settings.coarse_probability))], 2)
        condition = self.dit.condition(
            tuple(x0.shape[2:]),  # type: ignore[arg-type]
            text, real, batch["fps"], size, guide, listening := ~chosen(settings.token_dropout), generator,
        )  # fmt: skip
        ratio = time_ratio(*size, frames, settings.time_base_pixels) * settings.time_scale
        time = sample_times(count, ratio, generator, device)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        overlap = self.config.segment.overlap_latents
        noisy = sample_noisy(settings.masks, count, frames, overlap, generator, device) & ~given
        noisy = F.pad(noisy, (anchor.shape[2], 0))
        if self.training and settings.recycled_probability:
            whole = chosen(settings.recycled_probability) & ~silent & listening  # as segments are made
            recycled = ~noisy & F.pad(~given, (anchor.shape[2], 0)) & whole[:, None]
            x0 = torch.where(recycled[:, None, :, None, None], self._made(x0, condition, ratio, generator), x0)
        x = torch.where(noisy[:, None, :, None, None], add_noise(x0, noise, time), x0)
        velocity = self.dit.velocity(self.dit(x, time, condition, noisy))
        error = (velocity - (x0 - noise)).square().mean((1, 3, 4))
        asked = noisy.sum()
        loss = (error * noisy).sum() / asked.clamp(min=1)
        return Losses(loss, gates(condition.injection), count * self.dit.token_count(x0.shape[2:]), asked)

    def _segment(
        self, batch: dict[str, Any], generator: torch.Generator | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor]:
        """Latents and (fine, coarse) tokens of one segment of the clips, and which frames of it are an earlier
        caption's, bool [B, t].
        """
        groups = batch["latents"].shape[2] // GROUP_LATENTS
        window = group_window(groups, self.config.segment.groups, generator)
        x0 = cut(batch["latents"], window, groups, axis=2)
        given = cut(is_given(batch, groups * GROUP_LATENTS), window, groups, axis=1)
        if self.fine is None:
            return x0, None, given
        fine, coarse = (cut(batch[name], window, groups, axis=1) for name in ("tokens_fine", "tokens_coarse"))
        return x0, (fine, coarse), given

    def _anchor(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """The latents [B, C, a, h, w] that the clips begin with, as segments behind the first are given them; of some
        batches, and of clips that begin with an earlier caption, none.
        """
        latents, settings = batch["latents"], self.config.dit
        if not settings.anchor_groups:
            return latents[:, :, :0]
        drawn = torch.rand((), generator=generator, device=latents.device) < settings.anchor_share
        own = not bool(is_given(batch, latents.shape[2]).any())
        return latents[:, :, : self.config.anchor_latents if own and bool(drawn) else 0]

    def _drawn_by_ar(
        self,
        tokens: tuple[Tensor, Tensor],
        text: Tensor,
        mask: Tensor,
        chosen_B: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The fine tokens of the chosen samples as the AR draws them, each given the true ones before it."""
        assert self.ar is not None
        with torch.no_grad():
            chances = self.ar.eval()(text, mask, tokens[0]).float().softmax(-1)
            drawn = torch.multinomial(chances.flatten(0, 3), 1, generator=generator).view_as(tokens[0])
        return torch.where(chosen_B[:, None, None, None], drawn, tokens[0]), tokens[1]

    def _made(self, x0: Tensor, condition: Condition, ratio: float, generator: torch.Generator) -> Tensor:
        """What the DiT makes of x0 out of noise at drawn times, in one evaluation."""
        time = sample_times(len(x0), ratio, generator, x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        x = add_noise(x0, noise, time)
        with torch.no_grad():
            velocity = self.dit.velocity(self.dit(x, time, condition))
        return x + (time / NUM_TIMES)[:, None, None, None, None] * velocity

    def guide(self, tokens: tuple[Tensor, Tensor], use_coarse_B: Tensor) -> Tensor:
        """The latent that the fine tokens decode to, or for some samples the coarse ones."""
        fine, coarse = tokens
        assert self.fine is not None and self.coarse is not None
        parts = [codec.decode(part[use], self.config.latent_grid) for codec, part, use in (
            (self.fine, fine, ~use_coarse_B), (self.coarse, coarse, use_coarse_B)) if use.any()]  # fmt: skip
        order = torch.cat([torch.nonzero(~use_coarse_B), torch.nonzero(use_coarse_B)]).flatten()
        return torch.cat(parts)[order.argsort()]


def gates(injection: Mapping[str, Modulation]) -> dict[str, Tensor]:
    """How strongly each layer listens to the tokens: the mean size of its gate, and `gate`, the mean over all layers.

    Nothing without injection.
    """
    found = {name: first.detach().float().abs().mean() for name, (first, *_) in injection.items()}
    mean = {"gate": torch.stack(list(found.values())).mean()} if found else {}
    return mean | {f"gates/{name.zfill(2)}": value for name, value in found.items()}


class DitStage:
    """The DiT stage; `dit_base` is the text-only one."""

    figures: ClassVar[Mapping[str, bool]] = {"loss": False}

    def __init__(self, config: Config, source: BatchSource, paths: DitPaths, parents: Mapping[str, str]) -> None:
        if config.dit.injection.enabled != (paths.codec_fine is not None and paths.codec_coarse is not None):
            raise ValueError("semantic injection needs both codecs, the text-only baseline none")
        self.name = "dit" if config.dit.injection.enabled else "dit_base"
        self.config, self.source, self.paths, self.parents = config, source, paths, dict(parents)
        self.training, self.seed = config.dit.training, config.seed

    def objective(self) -> nn.Module:
        """A new DiT, or the one that `dit.init` names (a text-only one gets untrained injection)."""
        objective = DitObjective(self.config, self.paths)
        for part in (objective.fine, objective.coarse, objective.ar):
            if part is not None:
                part.requires_grad_(False)
        if self.config.dit.init:
            _initialise(objective.dit, self.config.dit.init)
        if self.config.dit.train_only == "injection":
            objective.dit.requires_grad_(False)
            if objective.dit.injection is None:
                raise ValueError("dit.train_only=injection needs dit.injection.enabled=true")
            objective.dit.injection.requires_grad_(True)
        return objective

    def batch(self, step: int, rank: int, world: int) -> dict[str, Any]:
        """See Stage."""
        return self.source.batch(step, rank, world)

    def evaluate(self, objective: nn.Module, device: torch.device) -> Evaluation:
        """Loss on held-out clips at fixed noise and times; true clips beside sampled ones (guided by true tokens)."""
        found, first = on_held_out(objective, self.source, self.training.batch_size, device, self.seed)
        if first is None:
            return Evaluation()
        with torch.no_grad():
            picture = self._picture(objective, first, device)  # type: ignore[arg-type]
        return Evaluation({"loss": found["loss"]}, {"sampled": picture})

    def _picture(self, objective: DitObjective, batch: dict[str, Any], device: torch.device) -> Any:
        options, video = default_options(self.config.sampling), self.config.video
        x0, tokens, _ = objective._segment(batch, None)
        size, sampled = (video.height, video.width), []
        grid = (x0.shape[2], x0.shape[3], x0.shape[4])
        settings = self.config.dit
        ratio = time_ratio(*size, x0.shape[2], settings.time_base_pixels) * settings.time_scale * options.time_shift
        for i in range(min(PICTURED, len(x0))):
            none_coarse = torch.zeros(1, dtype=torch.bool, device=device)
            guide = objective.guide((tokens[0][i : i + 1], tokens[1][i : i + 1]), none_coarse) if tokens else None
            text = (batch["text"][i : i + 1], batch["text_mask"][i : i + 1])
            velocity = guided_velocity(objective.dit, grid, text, guide, None, video.fps, size, options)
            drawn = torch.Generator(device=device).manual_seed(self.seed + i)
            noise = torch.randn(x0[:1].shape, generator=drawn, device=device)
            sampled.append(sample_flow(velocity, noise, schedule(options.steps, ratio), solver=options.solver))
        return comparison(*(look(latents, self.paths.vae) for latents in (x0[:PICTURED], torch.cat(sampled))))

    def export(self, objective: nn.Module, path: Path, *, metrics: dict[str, float], key: str) -> Artifact:
        """Write the DiT (without the codecs, which have artefacts of their own)."""
        dit: STDiT3 = objective.dit  # type: ignore[assignment]
        return save_artifact(
            path,
            kind="dit",
            config=dit.config.model_copy(update={"init": None}).model_dump(mode="json"),
            tensors=dit.state_dict(),
            parents=self.parents,
            metrics=metrics,
            key=key,
        )


def text_only(config: Config, steps: int) -> Config:
    """The configuration of the text-only DiT, trained for `steps`: no injection."""
    dit = config.dit.model_copy(
        update={
            "injection": config.dit.injection.model_copy(update={"enabled": False}),
            "train_only": "all",
            # without tokens these have no effect: left at fixed values, a change of theirs trains no new base
            "coarse_probability": 0.0,
            "uncertainty_probability": 0.0,
            "token_dropout": 0.0,
            "training": config.dit.training.model_copy(update={"steps": steps}),
        }
    )
    return config.model_copy(update={"dit": dit})


def initial_dit(path: str | Path) -> Artifact:
    """The artefact that `dit.init` names: a DiT, or the text-only (else the guided) DiT of a bundle.

    Raises ArtifactError.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        folder /= PARTS["dit_base" if (folder / PARTS["dit_base"][0]).exists() else "dit"][0]
    if not (folder / LINEAGE).is_file():
        raise ArtifactError(
            f"dit.init={path}: no DiT artefact and no bundle; public weights become one by jobs/import_opensora.py"
        )
    return load_artifact(folder, "dit")


def _initialise(dit: STDiT3, path: str) -> None:
    """Load `path` into `dit`. Raises ArtifactError if anything but the injection is missing, or does not fit."""
    tensors = initial_dit(path).tensors()
    own = dit.state_dict()
    missing = [name for name in own if name not in tensors and not name.startswith("injection.")]
    unexpected = [name for name in tensors if name not in own]
    wrong = [n for n, value in tensors.items() if n in own and own[n].shape != value.shape]
    for what, names in (("is missing", missing), ("is not part of this DiT", unexpected), ("has another shape", wrong)):
        if names:
            raise ArtifactError(f"dit.init={path}: {names[0]} {what} (and {len(names) - 1} more); are the sizes equal?")
    dit.load_state_dict(tensors, strict=False)
    if not any(name.startswith("injection.branch.") for name in tensors):
        dit.copy_into_branch()
