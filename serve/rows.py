"""Videos and jobs out of a database that other code may have written: newer code, before a rollback.

What this code does not know of a job's options is left out; what cannot be read at all becomes a failed video that can
be seen and deleted. Nothing here raises: one row must not take all others with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from arlon_ray.config import SamplingConfig
from serve.schema import Video, VideoError
from serve.work import DRAFT, JOB, Job

UNREADABLE = VideoError(code="unreadable", message="it was accepted by another version of the service")


def video_of(video_id: str, data: Mapping[str, Any]) -> Video:
    """The video; where it cannot be read, one of that name which has failed with UNREADABLE."""
    try:
        return Video.model_validate(data)
    except ValidationError:
        return Video(
            id=video_id,
            object="draft" if video_id.startswith(DRAFT) else "video",
            model="unknown",
            status="failed",
            created_at=_number(data.get("created_at")),
            completed_at=_number(data.get("completed_at")),
            expires_at=data["expires_at"] if isinstance(data.get("expires_at"), int) else None,
            seconds="0",
            size="0x0",
            prompt="",
            seed=0,
            segments=[],
            error=UNREADABLE,
        )


def job_of(data: Mapping[str, Any]) -> Job | None:
    """The job, with default values for `strange` options; None where it cannot be read."""
    try:
        return JOB.validate_python(data)
    except ValidationError:
        pass
    try:
        left_out = strange(data)
        options = {name: value for name, value in data["options"].items() if name not in left_out}
        return JOB.validate_python({**data, "options": options})
    except (ValidationError, LookupError, AttributeError, TypeError):
        return None


def files_of(job_id: str, data: Mapping[str, Any]) -> Job:
    """A job of which its name and place alone are known: enough to find its files."""
    tenant = data.get("tenant")
    return Job(job_id, (), 0, SamplingConfig(), tenant=tenant if isinstance(tenant, str) else "")


def strange(data: Mapping[str, Any]) -> set[str]:
    """Options of a job that this code does not know, or not with that value."""
    try:
        SamplingConfig.model_validate(data["options"])
    except ValidationError as error:
        return {str(each["loc"][0]) for each in error.errors() if each["loc"]}
    return set()


def _number(value: object) -> int:
    return value if isinstance(value, int) else int(time.time())
