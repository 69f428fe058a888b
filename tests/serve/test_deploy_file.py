"""serve/config.yaml, as `serve deploy` takes it."""

from __future__ import annotations

import importlib
from pathlib import Path

import httpx
import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from arlon_ray.bundle import load_bundle
from arlon_ray.config import ConfigError, load_config
from jobs.ray_session import connect
from serve.main import Arguments, application

ROOT = Path(__file__).resolve().parents[2]


def test_the_file_fits_ray_serves_schema_and_our_own(tmp_path: Path) -> None:
    parsed = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve" / "config.yaml").read_text()))
    (described,) = parsed.applications
    module, name = described.import_path.split(":")
    assert getattr(importlib.import_module(module), name) is application
    arguments = Arguments.model_validate({**described.args, "bundle": str(ROOT / "weights" / "tiny")})
    assert application(arguments)
    assert f"serve.host={parsed.http_options.host}" in arguments.set


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="bundel"):
        Arguments.model_validate({"bundel": "weights/tiny", "data": "d"})
    bundle = str(ROOT / "weights" / "tiny")
    with pytest.raises(ConfigError, match=r"serve\.prot"):
        application(Arguments(bundle=bundle, data="d", set=["serve.prot=1"]))
    with pytest.raises(ConfigError, match=r"serve\.database_url"):
        application(Arguments(bundle=bundle, data="s3://bucket/videos"))
    with pytest.raises(ConfigError, match=r"serve\.auth=off"):
        application(Arguments(bundle=bundle, data="d", set=["serve.host=0.0.0.0", "serve.auth=off"]))


def test_videos_do_not_lie_in_a_package_that_ray_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    bundle = str(ROOT / "weights" / "tiny")
    stays = str(tmp_path / "videos")
    for data, setting, told in (
        ("runs/serve", "serve.port=8000", "data=runs/serve"),
        (stays, "serve.data_dir=runs/videos", "serve.data_dir=runs/videos"),
        (stays, "serve.database_url=sqlite:///jobs.sqlite", "serve.database_url=jobs.sqlite"),
    ):
        with pytest.raises(ConfigError, match=f"{told}: would lie in the package"):
            application(Arguments(bundle=bundle, data=data, set=[setting]))
    monkeypatch.setenv("HOME", str(tmp_path))
    for data, setting in ((stays, "serve.port=8000"), ("~/v", "serve.port=8000"), ("v", f"serve.data_dir={stays}")):
        assert application(Arguments(bundle=bundle, data=data, set=[setting]))


@pytest.mark.ray
@pytest.mark.slow
def test_it_deploys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client

    described = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    described["http_options"]["port"] = 8123
    described["applications"][0]["args"]["data"] = str(tmp_path / "data")
    monkeypatch.chdir(ROOT)
    with connect(load_config("tiny")):
        http = {"host": "127.0.0.1", "port": 8123}
        serve.start(proxy_location="HeadOnly", http_options=http)
        try:
            _get_global_client().deploy_apps(ServeDeploySchema.model_validate(described), _blocking=True)
            with httpx.Client(base_url="http://127.0.0.1:8123", timeout=60) as client:
                made = client.post("/v1/videos", json={"prompt": "A red circle moves to the right."}).json()
                events = client.get(f"/v1/videos/{made['id']}/events").text
                assert "event: completed" in events
                assert (
                    client.get("/v1/models").json()["data"][0]["id"] == load_bundle(ROOT / "weights/tiny").config.name
                )
        finally:
            serve.shutdown()
