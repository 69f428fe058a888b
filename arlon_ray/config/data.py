"""Raw video to latents: which clips, at which shapes, filtered how, captioned by whom."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from arlon_ray.config.base import Section


class FilterConfig(Section):
    """Thresholds beyond which a clip is left out; null: that filter is off.

    Scores (`data_pipeline/scores.py`) are recorded whether a filter is on or off, but for `text`, which is dear: so a
    finished dataset can be filtered again without decoding (`jobs/refilter.py`).
    """

    min_duration_s: float | None = Field(None, gt=0, description="seconds of the whole file")
    min_short_side: int | None = Field(None, ge=1, description="pixels of the file's shorter side")
    max_black: float | None = Field(None, ge=0, le=1, description="share of black frames")
    max_frozen: float | None = Field(None, ge=0, le=1, description="share of frames that equal the one before")
    min_motion: float | None = Field(None, ge=0, description="mean optical flow, shorter sides a second")
    max_motion: float | None = Field(None, ge=0, description="the same, from above")
    min_sharpness: float | None = Field(None, ge=0, description="variance of the Laplacian; blurred is low")
    max_text: float | None = Field(None, ge=0, le=1, description="share of the picture covered by written text")
    near_duplicate_bits: int | None = Field(
        None, ge=0, le=16, description="of 192 bits of perceptual hash, how many may differ in a near-duplicate"
    )


class DataConfig(Section):
    """Raw video to latents. `bucket_groups` are the clip lengths kept, in 17-frame groups."""

    sample_videos: int = Field(2000, ge=1, description="videos that the pipeline renders when it is given none")
    sample_grade: Literal["simple", "rich", "returning", "changing"] = Field(
        "simple", description="grade of the rendered scenes"
    )
    path_column: str = Field("path", description="column of paths, where the input is a list of videos")
    caption_column: str = Field("caption", description="its column of captions, if it has one")
    captioner: str | None = Field(
        None, description="module:Class that captions the clips that have no caption (data_pipeline/captioners.py)"
    )
    captioner_options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of that class")
    captioner_gpus: float = Field(0.0, ge=0, description="GPUs of the captioner actor")
    shots: Literal["none", "content", "adaptive"] = Field(
        "none", description="cut files at shot boundaries, found by this detector of PySceneDetect"
    )
    shot_threshold: float | None = Field(None, gt=0, description="the detector's threshold (null: PySceneDetect's own)")
    bucket_groups: tuple[Annotated[int, Field(ge=1)], ...] = Field((2, 3, 4), min_length=1)
    aspect_ratios: tuple[Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")], ...] = Field(
        (), description='width:height of the buckets ("16:9"), each of the area of video.height × width; none: that one'
    )
    stride_groups: int | None = Field(
        None, ge=1, description="a clip begins so many 17-frame groups after the one before (null: where that ends)"
    )
    max_clips_per_video: int = Field(64, ge=1)
    filters: FilterConfig = Field(default_factory=FilterConfig)
    decode_threads: int = Field(1, ge=1)
    encode_batch: int = Field(16, ge=1, description="clips of one VAE batch")
    encoders: int = Field(1, ge=1, description="encoder actors")
    encoder_gpus: float = Field(0.0, ge=0, description="GPUs of one encoder actor")
    row_group: int = Field(64, ge=1, description="clips of one Parquet row group: the unit in which training reads")
    cache_bytes: int = Field(512 * 2**20, ge=0, description="decoded row groups that a training worker keeps")

    @model_validator(mode="after")
    def _thresholds_leave_something(self) -> DataConfig:
        low, high = self.filters.min_motion, self.filters.max_motion
        if low is not None and high is not None and low > high:
            raise ValueError(f"filters.min_motion={low} is above filters.max_motion={high}: no clip would be left")
        return self
