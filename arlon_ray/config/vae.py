"""Sizes and switches of the video VAEs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from arlon_ray.config.base import Section
from arlon_ray.config.training import TrainingConfig


class SpatialVaeConfig(Section):
    """The spatial half of Open-Sora's VAE: diffusers' `AutoencoderKL`, by default of SDXL's sizes."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = Field(2, ge=1)
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    scaling: float = Field(0.18215, gt=0, description="Open-Sora v1.2's, which is not SDXL's own")
    frame_batch: int = Field(4, ge=1, description="frames coded at a time")

    @model_validator(mode="after")
    def _eightfold(self) -> SpatialVaeConfig:
        if len(self.block_out_channels) != 4:
            raise ValueError(f"block_out_channels={list(self.block_out_channels)} must have 4 levels: 8×8 in space")
        return self


class TemporalVaeConfig(Section):
    """The temporal half of Open-Sora's VAE; field names are those of its own configuration."""

    in_out_channels: int = Field(4, ge=1)
    latent_embed_dim: int = Field(4, ge=1)
    embed_dim: int = Field(4, ge=1)
    filters: int = Field(128, ge=1)
    num_res_blocks: int = Field(4, ge=1)
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _levels(self) -> TemporalVaeConfig:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries, expected one less than "
                f"channel_multipliers ({len(self.channel_multipliers)})"
            )
        return self


class VaeConfig(Section):
    """The video VAE: 17-frame groups ↔ 5 latents, 8×8 in space.

    `folded` is the small convolutional one, `opensora` Open-Sora v1.2's (spatial, then temporal).
    """

    kind: Literal["folded", "opensora"] = "folded"
    latent_channels: int = Field(4, ge=1)
    width: int = Field(96, ge=8, description="folded: channels at half latent resolution")
    deep_width: int = Field(160, ge=8, description="folded: channels at latent resolution")
    blocks: int = Field(3, ge=1, description="folded: residual blocks at latent resolution, in encoder and decoder")
    spatial: SpatialVaeConfig = SpatialVaeConfig()
    temporal: TemporalVaeConfig = TemporalVaeConfig()
    group_batch: int = Field(16, ge=1, description="17-frame groups coded at a time")
    tile: int = Field(0, ge=0, description="side in pixels of the tiles coded at a time; 0: whole frames")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of weights and arithmetic when videos are made; datasets are encoded in float32"
    )
    kl_weight: float = Field(3e-4, ge=0)
    detail_weight: float = Field(2.0, ge=0, description="extra loss weight on what stands out from its surroundings")
    train: bool = Field(False, description="the pipeline trains a new VAE instead of loading `init`")
    init: str | None = Field("weights/tiny/vae", description="artefact to load")
    training: TrainingConfig = TrainingConfig()

    def without_effect(self) -> set[str]:
        """See Section: its precision is that of making videos."""
        return {"precision"}

    @model_validator(mode="after")
    def _parts_fit(self) -> VaeConfig:
        if self.tile % 8 or 0 < self.tile < 64:
            raise ValueError(f"tile={self.tile} must be 0, or a multiple of 8 of at least 64 pixels")
        if self.kind != "opensora":
            return self
        if sum(self.temporal.temporal_downsample) != 2:
            raise ValueError("temporal.temporal_downsample must halve twice: 17 frames ↔ 5 latents")
        if self.spatial.latent_channels != self.temporal.in_out_channels:
            raise ValueError(
                f"spatial.latent_channels={self.spatial.latent_channels} must equal "
                f"temporal.in_out_channels={self.temporal.in_out_channels}"
            )
        if self.temporal.embed_dim != self.latent_channels:
            raise ValueError(
                f"latent_channels={self.latent_channels} must equal temporal.embed_dim={self.temporal.embed_dim}"
            )
        if self.train:
            raise ValueError("train=true: only the folded VAE is trained here; Open-Sora's is imported")
        return self
