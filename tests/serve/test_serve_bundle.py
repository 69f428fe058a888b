"""The command behind `make serve`: what it refuses before Ray starts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from arlon_ray.bundle import load_bundle
from arlon_ray.config import ConfigError, ServeConfig
from jobs import command_line
from jobs import serve_bundle as serve_bundle_job
from jobs.command_line import BOX, InputError
from jobs.serve_bundle import check_port, parse
from jobs.serve_demo import free_port
from serve.app import check_devices, serve_bundle
from serve.exchange import LastServed
from serve.job_store import JobStore
from serve.owner import owning
from serve.settings import served_config
from tests.bundles import make_random_bundle, small_config


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_bundle(tmp_path_factory.mktemp("serve") / "bundle")


def test_settings_of_serving_may_change_and_those_of_training_may_not() -> None:
    trained = small_config()
    config = served_config(trained, None, ["serve.max_running=5", "sampling.steps=3"])
    assert (config.serve.max_running, config.sampling.steps) == (5, 3)
    assert config.dit == trained.dit
    assert served_config(trained, "tiny", []).sampling.steps == 8  # the preset's, not the bundle's 2
    with pytest.raises(ConfigError, match="--set dit: fixed by the bundle"):
        served_config(trained, None, ["dit.depth=5"])
    with pytest.raises(ConfigError, match=r"serve\.max_runing; did you mean serve\.max_running"):
        served_config(trained, None, ["serve.max_runing=5"])


def test_how_it_is_served_is_not_what_its_weights_were_trained_with(tmp_path: Path) -> None:
    """What is set goes into the bundle; defaults do not, or they would stay those of the day it was made."""
    made = make_random_bundle(tmp_path / "b", "serve.max_running=3", "serve.dit.num_cpus=2")
    assert json.loads((made / "bundle.json").read_text())["config"]["serve"] == {
        "max_running": 3,
        "dit": {"num_cpus": 2.0},
    }
    assert load_bundle(made).config.serve == small_config("serve.max_running=3", "serve.dit.num_cpus=2").serve
    assert load_bundle(BOX).config.serve == ServeConfig()


def test_host_and_port_are_overrides() -> None:
    arguments = parse(["--bundle", "b", "--port", "9001", "--host", "0.0.0.0", "--set", "sampling.steps=3"])
    config = served_config(small_config(), arguments.config, arguments.overrides)
    assert (config.serve.host, config.serve.port, config.sampling.steps) == ("0.0.0.0", 9001, 3)


def test_devices_must_fit() -> None:
    check_devices(small_config())
    with pytest.raises(ConfigError, match=r"serve\.ar\.num_gpus=0"):
        check_devices(small_config("device=cuda"))
    with pytest.raises(ConfigError, match=r"serve\.dit\.num_gpus=0\.5"):
        check_devices(small_config("serve.dit.num_gpus=0.5"))


def test_only_a_gpu_is_offloaded() -> None:
    with pytest.raises(ConfigError, match=r"serve\.ar: offload=text: frees a GPU's memory, but num_gpus=0"):
        small_config("serve.ar.offload=text")
    with pytest.raises(
        ConfigError, match=r"serve\.dit\.offload='some': Input should be 'none', 'text', 'idle' or 'all'"
    ):
        small_config("serve.dit.num_gpus=1", "serve.dit.offload=some")
    check_devices(small_config("device=auto", "serve.dit.num_gpus=1", "serve.dit.offload=all"))


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="cannot listen"):
            check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="cannot listen"):
        check_port("no.such.host.invalid", 1)


def end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Run the command up to where Ray would start: exit code and what it printed to stderr."""

    def never(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(serve_bundle_job, "connect", never)
    monkeypatch.setattr(sys, "argv", ["serve_bundle.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.run(serve_bundle_job.main)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("part missing", "ar"),
        ("weights cut", "dit/model"),
        ("no bundle", "--bundle"),
        ("key", "serve.prot"),
    ],
)
def test_bad_input_ends_with_code_2_and_one_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str,
    expected: str,
) -> None:  # fmt: skip
    path, more = tmp_path / "bundle", []
    shutil.copytree(bundle, path)
    if damage == "part missing":
        shutil.rmtree(path / "ar")
    elif damage == "weights cut":
        weights = path / "dit" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "no bundle":
        path = tmp_path / "nothing"
    else:
        more = ["--set", "serve.prot=1"]
    code, printed = end(monkeypatch, capsys, "--bundle", str(path), "--output", str(tmp_path / "out"), *more)
    assert code == 2
    assert printed.startswith("error:") and printed.count("\n") == 1 and expected in printed


def test_a_cluster_that_serves_already_is_bad_input(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = [{"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}]
    monkeypatch.setattr("serve.app.ray.util.list_named_actors", lambda **_: controller)
    with (
        pytest.raises(ConfigError, match="runs on this cluster already"),
        serve_bundle(small_config(), load_bundle(bundle), "d"),
    ):
        pass


def test_an_output_that_is_served_already_is_busy(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any model starts, and without a trace."""
    monkeypatch.setattr("serve.owner.WAIT_S", 0.1)
    monkeypatch.setattr("serve.app.ray.util.list_named_actors", lambda **_: [])
    monkeypatch.setattr("serve.app.serve.start", lambda **_: pytest.fail("Serve was started"))
    monkeypatch.setattr(serve_bundle_job, "connect", lambda _: nullcontext())
    arguments = ["--bundle", str(bundle), "--output", str(tmp_path), "--port", str(free_port())]
    monkeypatch.setattr(sys, "argv", ["serve_bundle.py", *arguments])
    engine = JobStore.in_folder(tmp_path).engine
    with owning(engine), pytest.raises(SystemExit) as ended:
        command_line.run(serve_bundle_job.main)
    printed = capsys.readouterr().err
    assert (ended.value.code, printed.count("\n")) == (75, 1)
    assert f"{tmp_path / 'jobs.sqlite'}: its videos are made by process {os.getpid()} on" in printed
    assert LastServed(engine).read() is None


def test_the_default_output_and_the_example_fit_the_rest() -> None:
    assert parse(["--bundle", "b"]).output == "runs/serve"
    assert "A red circle moves to the right." in serve_bundle_job.EXAMPLE.format(bundle="b", url="u", data="d")


def test_the_script_runs_from_a_folder_of_its_own(tmp_path: Path) -> None:
    script = Path(serve_bundle_job.__file__).resolve()
    command = [sys.executable, str(script), "--bundle", "nothing"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
