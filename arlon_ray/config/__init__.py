"""Typed, frozen configuration. `load_config("tiny", ["dit.training.steps=100"])` is the only way in."""

from arlon_ray.config.data import DataConfig, FilterConfig
from arlon_ray.config.load import (
    ConfigError,
    config_fingerprint,
    effective_settings,
    flat,
    load_config,
    merged,
    override,
    preset_names,
)
from arlon_ray.config.models import (
    GROUP_FRAMES,
    GROUP_LATENTS,
    LATENT_FRAMES,
    ArConfig,
    CodecConfig,
    DitConfig,
    FrameMaskConfig,
    InjectionConfig,
    SegmentConfig,
    TextConfig,
    VideoConfig,
    VqvaeConfig,
)
from arlon_ray.config.run import (
    ClusterConfig,
    Config,
    DeploymentConfig,
    GatesConfig,
    SamplingConfig,
    ServeConfig,
    Solver,
    TrackingConfig,
)
from arlon_ray.config.tenants import TENANT_PATTERN, TenantConfig
from arlon_ray.config.training import TrainingConfig
from arlon_ray.config.vae import SpatialVaeConfig, TemporalVaeConfig, VaeConfig

__all__ = [
    "GROUP_FRAMES",
    "GROUP_LATENTS",
    "LATENT_FRAMES",
    "TENANT_PATTERN",
    "ArConfig",
    "ClusterConfig",
    "CodecConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DeploymentConfig",
    "DitConfig",
    "FilterConfig",
    "FrameMaskConfig",
    "GatesConfig",
    "InjectionConfig",
    "SamplingConfig",
    "SegmentConfig",
    "ServeConfig",
    "Solver",
    "SpatialVaeConfig",
    "TemporalVaeConfig",
    "TenantConfig",
    "TextConfig",
    "TrackingConfig",
    "TrainingConfig",
    "VaeConfig",
    "VideoConfig",
    "VqvaeConfig",
    "config_fingerprint",
    "effective_settings",
    "flat",
    "load_config",
    "merged",
    "override",
    "preset_names",
]
