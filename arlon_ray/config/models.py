"""Sizes and switches of the models. Shapes: C latent channels, t latent frames, h × w latent grid."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from arlon_ray.config.base import Section
from arlon_ray.config.training import TrainingConfig

#: Frames of one VAE group and the latents it is coded to (Open-Sora v1.2: `micro_frame_size=17`).
GROUP_FRAMES = 17
GROUP_LATENTS = 5
#: Frames that each latent of a group stands for, but for its first, which is one frame.
LATENT_FRAMES = (GROUP_FRAMES - 1) // (GROUP_LATENTS - 1)


class VideoConfig(Section):
    """Size and rate of the frames that the system is trained on and makes."""

    height: int = Field(64, ge=16, description="pixels")
    width: int = Field(64, ge=16, description="pixels")
    fps: float = Field(16.0, gt=0, description="frames per second")


class SegmentConfig(Section):
    """A segment is what one DiT call renders: `groups` 17-frame groups, the first `overlap_groups` of them frozen."""

    groups: int = Field(4, ge=2)
    overlap_groups: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _overlap_is_shorter(self) -> SegmentConfig:
        if self.overlap_groups >= self.groups:
            raise ValueError(f"overlap_groups={self.overlap_groups} must be smaller than groups={self.groups}")
        return self

    @property
    def latents(self) -> int:
        """Latent frames of one segment."""
        return self.groups * GROUP_LATENTS

    def groups_of(self, segments: int) -> int:
        """17-frame groups of a video of so many segments."""
        return self.groups + (segments - 1) * (self.groups - self.overlap_groups)

    @property
    def overlap_latents(self) -> int:
        """Latent frames that one segment takes over from the one before."""
        return self.overlap_groups * GROUP_LATENTS


class TextConfig(Section):
    """The text encoder, frozen. Per-token embeddings, at most `max_tokens` of them."""

    kind: Literal["minilm", "t5"] = "t5"
    path: str | None = Field(
        None, description="T5: a folder made by jobs/import_opensora.py; MiniLM comes with a Python package if None"
    )
    dim: int = Field(4096, ge=1)
    max_tokens: int = Field(300, ge=4)
    cleaning: Literal["none", "opensora"] = Field(
        "none", description="`opensora`: captions are cleaned as for Open-Sora's training, wherever they are encoded"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the encoder's weights and arithmetic")
    layers: int | None = Field(
        None, ge=1, description="only its first layers; words of one kind (left, right) lie further apart there"
    )
    aesthetic_score: float | None = Field(
        None, ge=0, le=10, description="put behind every caption that names none, in the data and when served"
    )
    motion_score: float | None = Field(None, ge=0, description="likewise")
    camera_motion: str | None = Field(None, max_length=40, description="likewise")


class CodecConfig(Section):
    """One latent VQ-VAE. `patch` (t, h, w) latents become one token; the temporal factor is 1 or 5 (one group)."""

    patch: tuple[int, int, int] = (1, 2, 2)
    codebook_size: int = Field(512, ge=2)
    code_dim: int = Field(16, ge=1)
    width: int = Field(128, ge=8)
    blocks: int = Field(2, ge=0)
    encoder_kernel: Literal[1, 3] = Field(3, description="1: a token depends on its own patch alone, and is steadier")
    metric: Literal["euclidean", "cosine"] = Field("euclidean", description="cosine: codes of unit length")
    quantizer: Literal["ema", "rotation", "fsq"] = Field(
        "ema",
        description="ema: codes are moving averages; rotation: those, with the rotation trick's gradient; fsq: a fixed "
        "grid of `levels`",
    )
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field((8, 8, 8), description="fsq: values of each code channel")
    ema_decay: float = Field(0.95, gt=0, lt=1)
    commitment_weight: float = Field(0.25, ge=0)
    dead_code_threshold: float = Field(1.0, ge=0, description="codes used less than this per batch are restarted")
    init: str | None = Field(None, description="artefact that the pipeline uses as it is, instead of training one")
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _no_reach_across_groups(self) -> CodecConfig:
        if self.patch[0] not in (1, GROUP_LATENTS):
            raise ValueError(f"patch[0]={self.patch[0]} must be 1 or {GROUP_LATENTS}: no token reaches across groups")
        if min(self.patch) < 1:
            raise ValueError(f"patch={list(self.patch)} must be 1 or more in each direction")
        return self

    @model_validator(mode="after")
    def _grid_is_the_codebook(self) -> CodecConfig:
        if self.quantizer == "fsq" and (prod(self.levels) != self.codebook_size or len(self.levels) != self.code_dim):
            raise ValueError(
                f"levels={list(self.levels)} make {prod(self.levels)} codes of {len(self.levels)}, but codebook_size="
                f"{self.codebook_size} and code_dim={self.code_dim}"
            )
        return self


class VqvaeConfig(Section):
    """Two codecs of one class: `fine` is what the AR predicts, `coarse` is what the DiT also trains on."""

    fine: CodecConfig = CodecConfig()
    coarse: CodecConfig = CodecConfig(patch=(1, 4, 4))


class ArConfig(Section):
    """The autoregressive transformer."""

    dim: int = Field(192, ge=16)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(8 / 3, gt=0)
    block: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        (1, 1), description="rows and columns of the tokens that one step of the transformer gives"
    )
    dropout: float = Field(0.1, ge=0, lt=1)
    text_dropout: float = Field(0.1, ge=0, lt=1, description="share of samples trained without text, for guidance")
    token_noise: float = Field(0.05, ge=0, lt=1, description="share of context tokens replaced by random codes")
    context_groups: int = Field(3, ge=1, description="groups of earlier tokens that the AR looks back on")
    sink_groups: int = Field(
        0, ge=0, description="groups that the prompt began with, which the AR looks back on however long ago they were"
    )
    init: str | None = None
    first_frame_share: float = Field(
        0, ge=0, lt=1, description="share of the steps, at the start, that see the first latent frame of clips alone"
    )
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _heads_divide(self) -> ArConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim={self.dim} must be an even multiple of heads={self.heads}")
        if self.dim % 4:
            raise ValueError(f"dim={self.dim} must be a multiple of 4 (sines and cosines of two position tables)")
        return self


class InjectionConfig(Section):
    """Semantic injection: gated adaptive norm from the latent that the tokens decode to.

    `kind`: the other two are what the paper compares it with; `mlp_adapter` adds features of the tokens, `controlnet`
    runs copies of the listening layers beside them and adds what they give.
    """

    enabled: bool = True
    kind: Literal["adaptive_norm", "mlp_adapter", "controlnet"] = "adaptive_norm"
    layers: Literal["first_quarter", "first_half", "all", "last_half"] = "first_half"
    width: int = Field(128, ge=8, description="channels of the latent adapter's features")
    blocks: int = Field(2, ge=0, description="residual blocks of the latent adapter")


class FrameMaskConfig(Section):
    """Shares of samples trained with given frames (`x_mask`): Open-Sora v1.2's forms, and the overlap of segments.

    What is left of 1 trains without given frames. Frames here are latent frames. quarter_*: 1 to t/4 of them; image_*:
    one; random: each with one chance between 0.1 and 0.9; interpolate: every second; overlap: the first
    `segment.overlap_groups` groups.
    """

    overlap: float = Field(0.5, ge=0, le=1)
    random: float = Field(0.0, ge=0, le=1)
    interpolate: float = Field(0.0, ge=0, le=1)
    quarter_random: float = Field(0.0, ge=0, le=1)
    quarter_head: float = Field(0.0, ge=0, le=1)
    quarter_tail: float = Field(0.0, ge=0, le=1)
    quarter_head_tail: float = Field(0.0, ge=0, le=1)
    image_random: float = Field(0.0, ge=0, le=1)
    image_head: float = Field(0.0, ge=0, le=1)
    image_tail: float = Field(0.0, ge=0, le=1)
    image_head_tail: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _shares(self) -> FrameMaskConfig:
        total = sum(self.model_dump().values())
        if total > 1 + 1e-9:
            raise ValueError(f"the shares add up to {total:.4g}: expected 1 at most")
        return self


class DitConfig(Section):
    """STDiT3 (Open-Sora v1.2), with public parameter names; field names are those of its config.json."""

    depth: int = Field(28, ge=1, description="pairs of one spatial and one temporal block")
    hidden_size: int = Field(1152, ge=16)
    num_heads: int = Field(16, ge=1)
    in_channels: int = Field(4, ge=1)
    caption_channels: int = Field(4096, ge=1)
    model_max_length: int = Field(300, ge=1)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    mlp_ratio: float = Field(4.0, gt=0)
    qk_norm: bool = True
    pred_sigma: bool = True
    input_sq_size: int = Field(512, ge=1)
    temporal_attention: Literal["temporal", "joint"] = Field(
        "temporal", description="`joint`: temporal blocks attend over all tokens of the segment, not one place"
    )
    anchor_groups: int = Field(
        0,
        ge=0,
        description="groups that the prompt began with, which the DiT is given beside the overlap, however long ago",
    )
    injection: InjectionConfig = InjectionConfig()
    coarse_probability: float = Field(0.5, ge=0, le=1, description="share of samples guided by the coarse codec")
    uncertainty_probability: float = Field(0.3, ge=0, le=1, description="share of samples with perturbed statistics")
    ar_token_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of samples whose fine tokens an AR draws, each given the true ones before it",
    )
    recycled_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of samples whose given frames the DiT makes itself, with its errors, in one evaluation",
    )
    text_dropout: float = Field(0.1, ge=0, lt=1)
    token_dropout: float = Field(0.1, ge=0, lt=1)
    anchor_share: float = Field(0.5, ge=0, le=1, description="share of the batches that have their anchor_groups")
    masks: FrameMaskConfig = FrameMaskConfig()
    time_base_pixels: int = Field(512 * 512, ge=1, description="resolution at which the time-step transform is neutral")
    time_scale: float = Field(1.0, gt=0)
    init: str | None = None
    train_only: Literal["all", "injection"] = Field("all", description="`injection` freezes the base")
    base_steps: int = Field(0, ge=0, description="steps of text-only training before the guided one, in the pipeline")
    training: TrainingConfig = TrainingConfig()

    def without_effect(self) -> set[str]:
        """See Section."""
        anchor = set() if self.anchor_groups else {"anchor_groups", "anchor_share"}
        return anchor if self.recycled_probability else anchor | {"recycled_probability"}

    @model_validator(mode="after")
    def _heads_divide(self) -> DitConfig:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"hidden_size={self.hidden_size} must be an even multiple of num_heads={self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 (sines and cosines of rows and columns)"
            )
        return self
