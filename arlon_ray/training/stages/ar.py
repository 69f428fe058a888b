"""Training of the AR: next-token prediction over fine tokens, text dropped for guidance, noise in the context.

What a caption says of the objects and of who is where is decided in the first frame; the rest of a video follows from
it, and is most of the loss. With `ar.first_frame_share` training starts on first frames alone, as text-to-video models
start on pictures: then the little that word order is worth is not lost in what motion costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.artifact import Artifact, load_artifact, save_artifact
from arlon_ray.config import GROUP_LATENTS, CodecConfig, Config
from arlon_ray.generation.options import default_options
from arlon_ray.generation.sampling import sample_tokens
from arlon_ray.models.ar import ArTransformer, frame_times
from arlon_ray.models.codec import LatentCodec, load_codec
from arlon_ray.training.engine import Evaluation, Losses
from arlon_ray.training.pictures import comparison
from arlon_ray.training.stages.latents import BatchSource, cut, group_window, is_given, look, on_held_out, trimmed

PICTURED = 4


@dataclass(frozen=True)
class ArPaths:
    """Artefacts that the stage looks through: the fine codec and the VAE."""

    codec_fine: Path
    vae: Path


class ArObjective(nn.Module):
    """Cross-entropy of every visual token given the text and the tokens before it."""

    def __init__(self, config: Config, codec: CodecConfig) -> None:
        super().__init__()
        self.config, self.frames_per_group = config, GROUP_LATENTS // codec.patch[0]
        self.model = ArTransformer(
            config.ar, codebook_size=codec.codebook_size, text_dim=config.text.dim, max_text=config.text.max_tokens
        )

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
        """Cross-entropy of a window of fine tokens, some of the context replaced by noise, and accuracy.

        Tokens of an earlier caption are context alone.
        """
        tokens, times, asked = self.window(batch, generator)
        (text, mask), settings = trimmed(batch), self.config.ar
        if self.training:
            drop = torch.rand(len(tokens), generator=generator, device=tokens.device) < settings.text_dropout
            text, mask = self.model.without_text(text, mask, drop)
        inputs = tokens
        if self.training and settings.token_noise:
            noisy = torch.rand(inputs.shape, generator=generator, device=inputs.device) < settings.token_noise
            other = torch.randint(self.model.codebook_size, inputs.shape, generator=generator, device=inputs.device)
            inputs = torch.where(noisy, other, inputs)
        logits, targets = self.model(text, mask, inputs, times).float().flatten(0, 3), tokens.flatten()
        weight = asked[:, :, None, None].expand_as(tokens).flatten().float()
        asked_for = weight.sum()
        count = asked_for.clamp(min=1)
        loss = (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / count
        accuracy = ((logits.argmax(-1) == targets) * weight).sum() / count
        return Losses(loss, {"accuracy": accuracy}, targets.numel(), asked_for)

    def window(self, batch: dict[str, Any], generator: torch.Generator | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens [B, t', h', w'] of as many groups as sampling ever has at once, when their frames are [t'], and which
        frames the model is asked for, bool [B, t'].

        With a sink the first groups of a longer clip stay, and the others are from any place behind them. A new prompt
        has a sink of its own: a clip that begins with an earlier caption is asked for only in windows without one,
        which every second batch with such a clip has.
        """
        tokens, per_group = batch["tokens_fine"], self.frames_per_group
        if tokens.shape[1] < per_group:  # a single frame
            return tokens, None, ~is_given(batch, 1)
        groups, most = tokens.shape[1] // per_group, self.config.ar_window_groups
        asked = ~is_given(batch, groups * GROUP_LATENTS, GROUP_LATENTS // per_group)
        sink = self.config.ar.sink_groups if groups > most else 0
        if sink and not bool(asked.all()):
            sink *= int(torch.randint(2, (), generator=generator, device=tokens.device))
        behind = group_window(groups - sink, most - sink, generator)
        window = slice(behind.start + sink, behind.stop + sink)
        if not sink:
            return cut(tokens, window, groups, axis=1), None, cut(asked, window, groups, axis=1)
        first = slice(0, sink)
        of_one_caption = asked.all(1, keepdim=True)
        tokens, asked = (
            torch.cat([cut(values, first, groups, axis=1), cut(values, window, groups, axis=1)], dim=1)
            for values in (tokens, asked & of_one_caption)
        )
        return tokens, frame_times(tokens.shape[1], sink * per_group, per_group if behind.start else 0), asked


class ArStage:
    """The AR stage."""

    name = "ar"
    figures: ClassVar[Mapping[str, bool]] = {"loss": False, "perplexity": False, "accuracy": True}

    def __init__(self, config: Config, source: BatchSource, paths: ArPaths, parents: Mapping[str, str]) -> None:
        self.config, self.source, self.paths, self.parents = config, source, paths, dict(parents)
        self.training, self.seed = config.ar.training, config.seed
        self.codec: LatentCodec = load_codec(paths.codec_fine)

    def objective(self) -> nn.Module:
        """A new AR, or the one that `ar.init` names."""
        objective = ArObjective(self.config, self.codec.config)
        objective.model.start_from_codebook(self.codec.codebook, torch.Generator().manual_seed(self.seed))
        if self.config.ar.init:
            objective.model.load_state_dict(load_artifact(self.config.ar.init, "ar").tensors())
        return objective

    def batch(self, step: int, rank: int, world: int) -> dict[str, Any]:
        """See Stage."""
        batch = self.source.batch(step, rank, world)
        if step < self.config.ar.first_frame_share * self.training.steps:
            return batch | {"tokens_fine": batch["tokens_fine"][:, :1]}
        return batch

    def evaluate(self, objective: nn.Module, device: torch.device) -> Evaluation:
        """Loss, perplexity and accuracy on held-out clips; sampled plans beside true ones, decoded without DiT."""
        found, first = on_held_out(objective, self.source, self.training.batch_size, device, self.seed)
        if first is None:
            return Evaluation()
        loss = found["loss"]
        perplexity = math.exp(loss) if loss < 700 else math.inf
        metrics = {"loss": loss, "perplexity": perplexity, "accuracy": found["accuracy"]}
        return Evaluation(metrics, {"sampled": self._picture(objective.model, first, device)})  # type: ignore[arg-type]

    def _picture(self, model: ArTransformer, batch: dict[str, Any], device: torch.device) -> Any:
        """True clip and sampled plan side by side, one caption a row."""
        options = default_options(self.config.sampling)
        true, drawn = batch["tokens_fine"][:PICTURED], []
        for i in range(len(true)):
            generator = torch.Generator(device=device).manual_seed(self.seed + i)
            context = true[i, :0]
            text, mask = batch["text"][i : i + 1], batch["text_mask"][i : i + 1]
            grid = tuple(true.shape[1:])
            drawn.append(sample_tokens(model, text, mask, context, grid, options, generator))  # type: ignore[arg-type]
        clips = [look(self.codec.decode(tokens.cpu()), self.paths.vae) for tokens in (true, torch.stack(drawn))]
        return comparison(*clips)

    def export(self, objective: nn.Module, path: Path, *, metrics: dict[str, float], key: str) -> Artifact:
        """Write the AR."""
        model: ArTransformer = objective.model  # type: ignore[assignment]
        return save_artifact(
            path,
            kind="ar",
            config=model.settings(),
            tensors=model.state_dict(),
            parents=self.parents,
            metrics=metrics,
            key=key,
        )
