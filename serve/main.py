"""The application for `serve deploy serve/config.yaml`: what Ray Serve itself builds on a cluster that runs already."""

# no postponed annotations: Serve looks at the type of `application`'s argument

from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from sqlalchemy import make_url

from arlon_ray.bundle import load_bundle
from arlon_ray.config import Config, ConfigError
from arlon_ray.mirror import local
from serve.app import build_app
from serve.settings import config_of

#: In this folder Ray unpacks the working folders that a `runtime_env` brings.
PACKAGES = "working_dir_files"


class Arguments(BaseModel):
    """`args` of the application in the file. Paths must be readable wherever replicas run."""

    model_config = ConfigDict(extra="forbid")

    bundle: str = Field(description="what it is built for; `user_config` of VideoAPI may name the one that is served")
    data: str = Field(description="where videos and the job store are kept: a folder, or a bucket")
    config: str | None = Field(None, description="preset or file whose device, sampling and serve are used")
    set: list[str] = Field([], description="overrides, as the jobs' --set has them")


def application(arguments: Arguments) -> serve.Application:
    """The application that serves a bundle. Raises ArtifactError and ConfigError."""
    bundle = load_bundle(local(arguments.bundle).expanduser())
    configured = partial(config_of, source=arguments.config, overrides=arguments.set)
    bundle.check_text()
    config = configured(bundle)
    _check_lasting(config, arguments.data)
    if config.serve.trace_exporter:
        raise ConfigError("serve.trace_exporter: here Ray Serve wants it as `tracing_config`, beside `applications`")
    return build_app(config, bundle, arguments.data, configured)


def _check_lasting(config: Config, data: str) -> None:
    """Raises ConfigError for a place that is gone with Ray's package."""
    url = config.serve.database_url or ""
    places = {
        "serve.data_dir" if config.serve.data_dir else "data": config.serve.data_dir or data,
        "serve.database_url": make_url(url).database or "" if url.startswith("sqlite") else "",
    }
    for name, place in places.items():
        if place and "://" not in place and PACKAGES in Path(place).expanduser().absolute().parts:
            raise ConfigError(
                f"{name}={place}: would lie in the package that runtime_env brings, which Ray removes: name a place "
                "that stays (an absolute path), or a bucket"
            )
