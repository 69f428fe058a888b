"""The Serve application: API, AR, DiT and decoder, from one bundle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib import import_module
from logging import WARNING, getLogger
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig, TracingConfig

from arlon_ray.bundle import Bundle
from arlon_ray.config import Config, ConfigError
from serve.blobs import Blobs
from serve.deployments import bind_stages
from serve.exchange import LastServed
from serve.ingress import bind_api
from serve.job_store import JobStore
from serve.keys import check_auth
from serve.owner import owning
from serve.places import Places
from serve.settings import as_served

APP = "arlon"


def check_devices(config: Config) -> None:
    """Raises ConfigError if `device` and the deployments' GPUs contradict each other."""
    deployments = {"ar": config.serve.ar, "dit": config.serve.dit, "decoder": config.serve.decoder}
    if config.sampling.baseline:
        del deployments["ar"]  # there will be none
    for name, settings in deployments.items():
        if config.device == "cuda" and not settings.num_gpus:
            raise ConfigError(f"serve.{name}.num_gpus=0, but device=cuda: give every deployment a share of a GPU")
        if config.device == "cpu" and settings.num_gpus:
            raise ConfigError(f"serve.{name}.num_gpus={settings.num_gpus:g}, but device=cpu: one of them must change")


def check_exporter(path: str) -> None:
    """Raises ConfigError if there is nothing at `path` that Ray Serve could send traces with. Empty: none are sent."""
    if not path:
        return
    module, _, name = path.partition(":")
    try:
        if not module or not name:
            raise TypeError("expected MODULE:FUNCTION")
        found = getattr(import_module(module), name)
        if not inspect.isfunction(found) or inspect.signature(found).parameters:
            raise TypeError("expected a function without arguments that gives OpenTelemetry's span processors")
    except Exception as error:  # of any kind: the module is another's
        hint = "; pip install -c constraints.txt -e '.[otlp]'" if module == "serve.otlp" else ""
        raise ConfigError(f"serve.trace_exporter={path}: {' '.join(str(error).split())}{hint}") from None


def build_app(
    config: Config, bundle: Bundle, data_dir: str | Path, configured: Callable[[Bundle], Config] | None = None
) -> serve.Application:
    """The application that serves `bundle` with the settings of `config`; videos are kept in `data_dir`.

    `configured` gives the configuration of a bundle that takes its place; by default with the settings of `config`.
    `config.serve.data_dir`, where it is set, goes before `data_dir`. Both paths must be readable wherever replicas run.
    Raises ConfigError as `check_devices`, `check_auth` and `check_exporter` do.
    """
    check_devices(config)
    check_auth(config.serve)
    check_exporter(config.serve.trace_exporter)
    data = _data(config, data_dir)
    if "://" in data and config.serve.database_url is None:
        raise ConfigError(f"serve.data_dir={data}: a database is no file of a bucket: set serve.database_url too")
    try:
        Places(Blobs(data), config.serve.tenants)
    except ValueError as error:
        raise ConfigError(f"serve.tenants: a data_dir cannot be opened: {' '.join(str(error).split())}") from None
    path = str(bundle.path.expanduser().absolute())
    return bind_api(config, data, path, configured or partial(as_served, config), bind_stages(config, path))


def _data(config: Config, data_dir: str | Path) -> str:
    """The folder as an absolute path, or the bucket, that videos are kept in."""
    data = str(config.serve.data_dir or data_dir)
    return data if "://" in data else str(Path(data).expanduser().absolute())


@contextmanager
def serve_bundle(config: Config, bundle: Bundle, data_dir: str | Path) -> Iterator[str]:
    """Serve `bundle` on the connected Ray cluster until the block ends; yields the URL.

    Raises ConfigError if Serve runs there already (its HTTP address could not be set), OwnerError if another service
    makes the videos of this database, RuntimeError if a deployment cannot start.
    """
    app = build_app(config, bundle, data_dir)
    if any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in ray.util.list_named_actors(all_namespaces=True)):
        raise ConfigError("Ray Serve runs on this cluster already: end it with `serve shutdown`")
    opened = JobStore.opened(config.serve.database_url, Path(_data(config, data_dir)))
    with closing(opened) as store, owning(store.engine):
        # who starts it by name wants this bundle, whatever was served there last
        LastServed(store.engine).write(str(bundle.path.expanduser().absolute()))
    http = HTTPOptions(host=config.serve.host, port=config.serve.port)
    # clients poll: a line for each request would bury all others
    quiet = LoggingConfig(
        enable_access_log=False,
        encoding="JSON" if config.serve.log_format == "json" else "TEXT",
        log_level=config.serve.log_level.upper(),
    )
    # Serve's own start-up lines speak of "existing" apps and options "not applied" where all is well
    getLogger("ray.serve").setLevel(WARNING)
    exporter = config.serve.trace_exporter
    # all requests: Ray decides anew in every process that an unsampled request comes to. None: Ray's own variables
    traced = TracingConfig(enabled=True, exporter_import_path=exporter, sampling_ratio=1.0) if exporter else None
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=quiet, tracing_config=traced)
    try:
        serve.run(app, name=APP, route_prefix="/", logging_config=quiet)
        shown = "127.0.0.1" if config.serve.host in ("0.0.0.0", "::") else config.serve.host
        yield f"http://{shown}:{config.serve.port}"
    finally:
        serve.shutdown()
