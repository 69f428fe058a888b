"""What a tenant of the service may have: the users whose keys name it, or one user alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, field_validator

from arlon_ray.config.base import Section

#: Also a folder's name.
TENANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9@._+-]{0,63}$"
TenantName = Annotated[str, StringConstraints(pattern=TENANT_PATTERN)]


class TenantConfig(Section):
    """Share and quotas of one tenant; null: no quota."""

    weight: float = Field(1.0, gt=0, description="with twice the weight twice as many turns while others wait")
    max_running: int | None = Field(None, ge=1, description="videos made at the same time; the others wait")
    max_queued: int | None = Field(None, ge=1, description="videos waiting; null: serve.max_queued_per_key")
    segments_per_day: int | None = Field(None, ge=1, description="accepted in one day (UTC), deleted ones too")
    max_stored_bytes: int | None = Field(None, ge=1, description="of finished videos: then no more are accepted")
    data_dir: str | None = Field(
        None, description="where its files lie: a folder or a bucket; null: tenants/NAME in serve.data_dir"
    )

    @field_validator("data_dir")
    @classmethod
    def _the_same_everywhere(cls, value: str | None) -> str | None:
        if value is not None and "://" not in value and not Path(value).is_absolute():
            raise ValueError(f"{value}: expected an absolute folder or an address such as s3://BUCKET/FOLDER")
        return value
