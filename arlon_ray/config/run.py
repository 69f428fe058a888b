"""What is run where: data, workers, sampling, serving, and the whole configuration."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from arlon_ray.config.base import Section
from arlon_ray.config.data import DataConfig
from arlon_ray.config.models import (
    GROUP_FRAMES,
    GROUP_LATENTS,
    ArConfig,
    CodecConfig,
    DitConfig,
    SegmentConfig,
    TextConfig,
    VideoConfig,
    VqvaeConfig,
)
from arlon_ray.config.tenants import TENANT_PATTERN, TenantConfig, TenantName
from arlon_ray.config.vae import VaeConfig
from arlon_ray.offload import Offload
from arlon_ray.precision import Weights


class ClusterConfig(Section):
    """What a training job asks Ray for."""

    num_workers: int = Field(2, ge=1)
    max_workers: int | None = Field(
        None, ge=1, description="elastic: training goes on with any number from num_workers to this, as machines allow"
    )
    cpus_per_worker: float = Field(1.0, gt=0)
    use_gpu: bool = False
    max_failures: int = Field(1, ge=0, description="worker failures after which a job gives up")

    @model_validator(mode="after")
    def _more_is_more(self) -> ClusterConfig:
        if self.max_workers is not None and self.max_workers < self.num_workers:
            raise ValueError(f"max_workers={self.max_workers} is below num_workers={self.num_workers}")
        return self

    @property
    def worker_counts(self) -> range:
        """How many workers a training may have."""
        return range(self.num_workers, (self.max_workers or self.num_workers) + 1)


#: How the flow is followed: arlon_ray/diffusion/solvers.py.
Solver = Literal["euler", "midpoint", "heun", "ab2", "dpm2m"]


class SamplingConfig(Section):
    """How a video is made."""

    steps: int = Field(8, ge=1, description="denoising steps")
    solver: Solver = Field("euler", description="midpoint and heun evaluate the DiT twice a step, the others once")
    guidance_scale: float = Field(2.0, ge=0, description="text guidance of the DiT")
    token_guidance_scale: float = Field(1.0, ge=0, description="token guidance of the DiT; 1 costs nothing")
    continued_guidance: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the DiT's text guidance where a text goes on from segment to segment; 0 costs nothing",
    )
    time_shift: float = Field(
        1.0,
        gt=0,
        description="multiplies the ratio that times are transformed with; below 1 more steps have little noise",
    )
    guidance_low: float = Field(
        0.0, ge=0, le=1, description="below this time (0: data) the DiT has no guidance; saves its evaluations"
    )
    guidance_high: float = Field(1.0, ge=0, le=1, description="above this time (1: noise) the DiT has no guidance")
    cache_layers: int = Field(
        0, ge=0, description="so many of the DiT's last layers are computed every cache_every-th evaluation; 0: always"
    )
    cache_every: int = Field(2, ge=1, description="in between, what these layers added before is added again")
    start: float = Field(
        1.0, gt=0, le=1, description="noise that sampling starts from; below 1 the rest is the latent of the tokens"
    )
    ar_guidance_scale: float = Field(1.5, ge=0, description="text guidance of the AR; 1 costs nothing")
    ar_contrast: bool = Field(
        True,
        description="behind a change of the text the AR is guided away from the prompt before, not from no text: for "
        "one that has seen no captions change",
    )
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0, description="0: all codes")
    top_p: float = Field(0.95, gt=0, le=1)
    seam_frames: int = Field(
        12, ge=0, lt=GROUP_FRAMES, description="frames behind each of the VAE's borders over which a jump is taken back"
    )
    baseline: bool = Field(False, description="the text-only DiT, without the AR's tokens")
    negative_prompt: str = Field(
        "", description="what the text guidance of AR and DiT leads away from, instead of from no text"
    )

    @model_validator(mode="after")
    def _low_below_high(self) -> SamplingConfig:
        if self.guidance_low > self.guidance_high:
            raise ValueError(f"guidance_low={self.guidance_low} is above guidance_high={self.guidance_high}")
        return self

    @property
    def evaluations(self) -> int:
        """How often the DiT is evaluated for a segment."""
        return {"midpoint": 2 * self.steps, "heun": 2 * self.steps - 1}.get(self.solver, self.steps)


class DeploymentConfig(Section):
    """One Ray Serve deployment: its resources and its own autoscaling."""

    min_replicas: int = Field(1, ge=0, description="0: none where there is nothing to do; the next video waits for one")
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: float = Field(
        4.0, gt=0, description="segments (AR: plans at work) that come to one replica before there is another"
    )
    upscale_delay_s: float = Field(5.0, gt=0, description="how long more replicas must be needed before they are added")
    downscale_delay_s: float = Field(60.0, ge=0, description="how long fewer must do before some are taken away")
    max_ongoing_requests: int = Field(
        16, ge=1, description="calls that a replica takes; those beyond max_batch wait beside the model"
    )
    max_batch: int = Field(
        8, ge=1, description="AR and DiT: requests that share the model's steps; bounds the memory of a replica"
    )
    num_cpus: float = Field(
        0.5,
        ge=0,
        description="what Ray reserves for a replica, and with how many threads it computes: one at least, the DiT "
        "two, the decoder as many for each of two segments",
    )
    num_gpus: float = Field(0.0, ge=0)
    offload: Offload = Field(
        "none",
        description="parts that are not on the GPU: text (its encoder computes on the CPU), idle (what does not work "
        "waits in main memory), all (both)",
    )

    @model_validator(mode="after")
    def _offloaded_from_a_gpu(self) -> DeploymentConfig:
        if self.offload != "none" and not self.num_gpus:
            raise ValueError(f"offload={self.offload}: frees a GPU's memory, but num_gpus=0: leave it out")
        return self

    @model_validator(mode="after")
    def _min_below_max(self) -> DeploymentConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}")
        return self


#: Bytes of bodies at the same time, or of the longest one, where that is more.
UPLOAD_MEMORY = 256 * 2**20


class ServeConfig(Section):
    """The HTTP service."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    data_dir: str | None = Field(
        None, description="where videos and the job store lie: a folder, or a bucket (then database_url too); "
        "default: the output",
    )  # fmt: skip
    max_segments: int = Field(256, ge=1, description="longest video that a request may ask for")
    max_prompt_characters: int = Field(1000, ge=1)
    max_running: int | None = Field(
        None,
        ge=1,
        description="videos made at the same time; the others wait. null: as many as keep every replica at work "
        "(max_replicas x target_ongoing_requests of a stage), 8 at least",
    )
    max_queued: int = Field(64, ge=1, description="videos waiting; more are refused with 429")
    planned_ahead: int = Field(2, ge=1, description="segments that the AR may be ahead of the DiT")
    max_queued_per_key: int = Field(
        32, ge=1, description="videos of one tenant (a key without one is its own) that may wait; more get a 429"
    )
    tenants: dict[TenantName, TenantConfig] = Field({}, description="share and quotas of some, by name")
    tenant_default: TenantConfig = Field(TenantConfig(), description="of each tenant that `tenants` does not name")
    keep_hours: float | None = Field(
        None, gt=0, description="finished videos are removed after so long, those of before too; null: no more of them"
    )
    database_url: str | None = Field(
        None, description="SQLAlchemy's address of the job store; null: SQLite beside the videos"
    )
    auth: Literal["auto", "on", "off"] = Field(
        "auto", description="bearer keys (jobs/keys.py); auto: unless the host is this machine alone"
    )
    allowed_hosts: tuple[str, ...] = Field(
        (), description="further names by which browsers may reach the service where keys are off"
    )
    requests_per_minute: int = Field(600, ge=1, description="of one key that has no limit of its own")
    max_open_per_key: int = Field(
        200, ge=1, description="requests of one key that are open at the same time (events, streams); more get a 429"
    )
    max_upload_bytes: int = Field(16 * 2**20, ge=1024, description="longest body of a request; longer ones get a 413")
    upload_memory_bytes: int = Field(
        UPLOAD_MEMORY, ge=1024, description="bodies of all requests at the same time; what is beyond gets a 503"
    )
    max_image_pixels: int = Field(32 * 2**20, ge=64, description="largest picture that is decoded")
    body_timeout_s: float = Field(60.0, gt=0, description="a body that takes longer to arrive is given up with a 408")
    stuck_s: float | None = Field(
        1800.0,
        gt=0,
        description="a replica of a stage whose step (decoder: segment) takes longer is replaced, and its calls are "
        "made again; null: never",
    )
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning"] = "info"
    trace_exporter: str = Field(
        "",
        description="MODULE:FUNCTION, of OpenTelemetry's span processors (serve.otlp:processors); empty: no traces",
    )
    ar: DeploymentConfig = DeploymentConfig()
    dit: DeploymentConfig = DeploymentConfig()
    decoder: DeploymentConfig = DeploymentConfig(num_cpus=0.25, max_ongoing_requests=4)

    @field_validator("auth", mode="before")
    @classmethod
    def _yaml_reads_on_and_off_as_true_and_false(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="before")
    @classmethod
    def _at_least_one_upload_by_default(cls, values: Any) -> Any:
        most = values.get("max_upload_bytes") if isinstance(values, dict) else None
        if isinstance(most, int) and most > UPLOAD_MEMORY and "upload_memory_bytes" not in values:
            return {**values, "upload_memory_bytes": most}
        return values

    @model_validator(mode="after")
    def _room_for_one_upload(self) -> ServeConfig:
        if self.upload_memory_bytes < self.max_upload_bytes:
            raise ValueError(
                f"upload_memory_bytes={self.upload_memory_bytes} is below max_upload_bytes={self.max_upload_bytes}"
            )
        return self

    @model_validator(mode="after")
    def _a_place_is_one_tenants(self) -> ServeConfig:
        if self.tenant_default.data_dir is not None:
            raise ValueError("tenant_default.data_dir: a place belongs to one tenant: set serve.tenants.NAME.data_dir")
        return self

    @property
    def most_running(self) -> int:
        """`max_running`, or what it says by default. A video is one call of a stage at a time."""
        calls = (stage.max_replicas * stage.target_ongoing_requests for stage in (self.ar, self.dit, self.decoder))
        return self.max_running or max(8, math.ceil(max(calls)))

    def tenant(self, name: str) -> TenantConfig:
        """Share and quotas of a tenant. One that `tenants` names has nothing of `tenant_default`."""
        return self.tenants.get(name, self.tenant_default)


class TrackingConfig(Section):
    """MLflow. Without a URI the store is SQLite in the output folder (or MLFLOW_TRACKING_URI, where it is set)."""

    uri: str | None = None
    experiment: str = "arlon-ray"
    tenant: str | None = Field(
        None, pattern=TENANT_PATTERN, description="whose runs these are: a tag of each, and the namespace in Ray"
    )
    register_models: bool = Field(
        True, description="finished artefacts are uploaded and registered as EXPERIMENT-STAGE, with the alias `newest`"
    )


class GatesConfig(Section):
    """Shares of rendered scenes whose content must survive a stage before the next one is trained; 0: no gate.

    They hold for the footage that the pipeline renders itself: of other footage the truth is not known.
    """

    vae_shape: float = Field(0.9, ge=0, le=1, description="shapes through the VAE")
    codec_motion: float = Field(0.9, ge=0, le=1, description="directions through VAE and fine codec")
    ar_motion: float = Field(0.5, ge=0, le=1, description="directions in the AR's own plans, decoded without a DiT")
    scenes: int = Field(32, ge=1, description="scenes that are looked at")


class Config(Section):
    """The whole configuration of every job."""

    name: str = "custom"
    seed: int = Field(0, ge=0, lt=10**9)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Weights = Field(
        "fp32", description="of the AR and the DiT when videos are made; int8: weights of 8 bits"
    )
    video: VideoConfig = VideoConfig()
    segment: SegmentConfig = SegmentConfig()
    vae: VaeConfig = VaeConfig()
    text: TextConfig = TextConfig()
    vqvae: VqvaeConfig = VqvaeConfig()
    ar: ArConfig = ArConfig()
    dit: DitConfig = DitConfig()
    data: DataConfig = DataConfig()
    gates: GatesConfig = GatesConfig()
    sampling: SamplingConfig = SamplingConfig()
    cluster: ClusterConfig = ClusterConfig()
    serve: ServeConfig = ServeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        if self.dit.anchor_groups > (new := self.segment.groups - self.segment.overlap_groups):
            raise ValueError(f"dit.anchor_groups={self.dit.anchor_groups}: a segment adds only {new}")
        if self.dit.in_channels != self.vae.latent_channels:
            raise ValueError(
                f"dit.in_channels={self.dit.in_channels} must equal vae.latent_channels={self.vae.latent_channels}"
            )
        if self.sampling.cache_layers >= self.dit.depth:
            raise ValueError(
                f"sampling.cache_layers={self.sampling.cache_layers} must be below dit.depth={self.dit.depth}"
            )
        if self.dit.caption_channels != self.text.dim:
            raise ValueError(f"dit.caption_channels={self.dit.caption_channels} must equal text.dim={self.text.dim}")
        if self.dit.model_max_length != self.text.max_tokens:
            raise ValueError(
                f"dit.model_max_length={self.dit.model_max_length} must equal text.max_tokens={self.text.max_tokens}"
            )
        if self.ar.context_groups < self.segment.overlap_groups:
            raise ValueError(
                f"ar.context_groups={self.ar.context_groups} must cover segment.overlap_groups="
                f"{self.segment.overlap_groups}"
            )
        if self.ar.sink_groups > self.segment.groups:
            raise ValueError(
                f"ar.sink_groups={self.ar.sink_groups} must be of the first segment: at most segment.groups="
                f"{self.segment.groups}"
            )
        shared = self.dit.training.sequence_parallel
        if self.dit.num_heads % shared:
            raise ValueError(
                f"dit.training.sequence_parallel={shared} must divide dit.num_heads={self.dit.num_heads}: workers that "
                "share frames share the heads of attention over time"
            )
        for name, size in (("video.height", self.video.height), ("video.width", self.video.width)):
            if size % 8:
                raise ValueError(f"{name}={size} must be a multiple of 8 (one latent is 8×8 pixels)")
        return self

    @property
    def ar_window_groups(self) -> int:
        """The most groups that the AR ever has at once when it plans."""
        seen = self.ar.sink_groups + self.ar.context_groups
        return max(self.segment.groups, seen + self.segment.groups - self.segment.overlap_groups)

    @property
    def anchor_latents(self) -> int:
        """Latent frames that the DiT is given of what the prompt began with."""
        return self.dit.anchor_groups * GROUP_LATENTS

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Latent grid (h, w) of one frame."""
        return self.video.height // 8, self.video.width // 8

    def token_grid(self, codec: CodecConfig, groups: int) -> tuple[int, int, int]:
        """Grid (t, h, w) of a codec's tokens of so many groups."""
        sizes = (groups * GROUP_LATENTS, *self.latent_grid)
        t, h, w = (-(-size // patch) for size, patch in zip(sizes, codec.patch, strict=True))
        return t, h, w
