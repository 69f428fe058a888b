"""The whole pipeline over four hosts with no folder in common, results in a bucket; and hosts that do not fit."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from arlon_ray import __version__, mirror
from arlon_ray.artifact import load_artifact
from arlon_ray.generation.video import read_video
from data_pipeline.dataset import LatentDataset
from jobs.preprocess import run_preprocess
from tests.deploy.separate_hosts import RAY, ROOT, SeparateHost, ask, end, ray_on, separate_hosts
from tests.namespaces import why_not
from tests.s3 import s3_server

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.timeout(3600),
]

NETWORK = "10.214.7"
VIDEOS, STEPS = 12, 4
#: A proof of plumbing: a few steps of everything.
SMALL = [
    "data.bucket_groups=[2]",
    "data.encoders=2",
    "data.encode_batch=2",
    "cluster.num_workers=2",
    "dit.init=null",
    "dit.base_steps=0",
    *(f"{part}.training.{setting}" for part in ("vqvae.fine", "vqvae.coarse", "ar", "dit")
      for setting in (f"steps={STEPS}", "batch_size=4", "held_out=2", "log_every=1")),
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The hosts, the head first, their Ray's address, and a bucket that they all reach."""

    hosts: list[SeparateHost]
    address: str
    options: str
    folder: Path

    def uri(self, name: str) -> str:
        """The location of something in the bucket."""
        return f"s3://runs/{name}{self.options}"

    def command(self, job: str, settings: list[str], **flags: str) -> list[str]:
        """A job over the cluster."""
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        return [sys.executable, f"jobs/{job}.py", *words, *(word for one in settings for word in ("--set", one))]

    def job(self, host: int, job: str, more: list[str] | None = None, **flags: str) -> str:
        """Run a job from a host to its end; what it said."""
        settings = [] if job == "render_samples" else [*SMALL, *(more or [])]
        done = self.hosts[host].run(self.command(job, settings, **flags), timeout_s=900, RAY_ADDRESS=self.address)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hosts")
    with (
        separate_hosts(4, folder, NETWORK) as four,
        s3_server("runs", host=f"{NETWORK}.254") as options,
        ray_on(four, folder) as address,
    ):
        yield Place(four, address, options, folder)


def where_they_ran(place: Place, kind: str) -> set[str]:
    """The nodes on which actors of this kind lived."""
    nodes = "{n['NodeID']: n['NodeManagerAddress'] for n in ray.nodes()}"
    actors = "ray._private.state.actors().values()"
    expression = f"[{nodes}[a['Address']['NodeID']] for a in {actors} if {kind!r} in a['ActorClassName']]"
    return set(re.findall(r"[\d.]+", ask(place.hosts[0], place.address, expression)))


def rows(dataset: LatentDataset) -> list[Any]:
    """Everything that a dataset holds, in an order of its own."""
    found = []
    for bucket, index in dataset.buckets.items():
        for number in range(len(index.groups)):
            group = dataset.read_group(bucket, number)
            assert group.latents is not None
            for row, clip in enumerate(group.clip_ids.tolist()):
                tokens = {name: values[row].tobytes() for name, values in group.tokens.items()}
                text = group.texts[row].tobytes()
                found.append((clip, bucket, group.captions[row], text, group.latents[row].tobytes(), tokens))
    return sorted(found, key=lambda row: row[0])


def test_the_pipeline_runs_over_hosts_that_share_no_folder(place: Place, tmp_path: Path, monkeypatch) -> None:
    uri = place.uri
    place.job(1, "render_samples", count=str(VIDEOS), output=uri("videos"))
    said = place.job(1, "preprocess", input=uri("videos"), output=uri("dataset"))
    assert re.search(r"done, \d\d clips .* 0 rejects", said), said
    encoders = where_they_ran(place, "ClipEncoder")

    codecs = {f"codec_{role}": uri(f"vqvae/codec_{role}") for role in ("fine", "coarse")}
    place.job(2, "train_vqvae", dataset=uri("dataset"), output=uri("vqvae"))
    place.job(3, "extract_tokens", dataset=uri("dataset"), **codecs)
    interrupted(place, dataset=uri("dataset"), codec_fine=codecs["codec_fine"], output=uri("ar"))
    place.job(2, "train_dit", dataset=uri("dataset"), output=uri("dit"), **codecs)
    trainers = where_they_ran(place, "RayTrainWorker")
    assert len(trainers) > 1 and f"{NETWORK}.1" not in trainers, "two workers, one CPU a host"
    assert encoders and f"{NETWORK}.1" not in encoders

    place.job(3, "make_bundle", ar=uri("ar/ar"), dit=uri("dit/dit"), output=uri("bundle"), **codecs)
    # on a host that has had nothing to do with any of it yet: the head
    video = uri("films/a.mp4")
    flags = {"bundle": uri("bundle"), "prompt": "A red circle moves to the right.", "steps": "2", "output": video}
    done = place.hosts[0].run(place.command("generate", [], **flags))
    assert done.returncode == 0, done.stdout + done.stderr

    monkeypatch.setenv("ARLON_MIRROR", str(tmp_path / "mirror"))
    assert len(read_video(mirror.pull(mirror.local(video)))) == 34
    equal_to_one_node(place, codecs, tmp_path)


def interrupted(place: Place, **flags: str) -> None:
    """Train the AR, killed at a checkpoint with the host's driver, then on another host: it goes on from there."""
    settings = [*SMALL, "ar.training.steps=30", "ar.training.checkpoint_every=5"]
    log = place.folder / "ar.log"
    training = place.hosts[1].popen(place.command("train_ar", settings, **flags), log, RAY_ADDRESS=place.address)
    while not re.search(r"(1\d|2\d)/30", log.read_text()):
        assert training.poll() is None, log.read_text()
        time.sleep(0.2)
    end(training)
    assert "done" not in log.read_text()
    said = place.job(3, "train_ar", settings[len(SMALL) :], **flags)
    step = re.search(r"going on after step (\d+) of 30", said)
    assert step and int(step[1]) >= 5, said


def equal_to_one_node(place: Place, codecs: dict[str, str], tmp_path: Path) -> None:
    """One node, folders of its own, the same seed: the same rows, the same tokens, the same codec."""
    from arlon_ray.config import load_config
    from jobs.extract_tokens import run_extract_tokens
    from jobs.ray_session import connect
    from jobs.stage_runs import run_codec

    config = load_config("tiny", SMALL)
    vae, alone = Path(str(config.vae.init)), tmp_path / "alone"
    with connect(config):
        run_preprocess(config, place.uri("videos"), alone)
        fine = run_codec(config, "fine", alone, vae, tmp_path / "codec_fine").artifact
        coarse = load_artifact(codecs["codec_coarse"], "codec")
        run_extract_tokens(config, alone, fine.path, coarse.path, tmp_path / "tokens")
    there = mirror.local(place.uri("dataset"))
    assert fine.fingerprint == load_artifact(codecs["codec_fine"], "codec").fingerprint
    assert rows(LatentDataset(there, tokens=there / "tokens")) == rows(LatentDataset(alone, tokens=tmp_path / "tokens"))


def test_a_host_with_another_version_of_the_project_is_refused(place: Place) -> None:
    """Before any work, with both versions; the host is the last one of this file to be used."""
    source = ROOT / "arlon_ray" / "__init__.py"
    place.hosts[3].replace(source, source.read_text().replace(__version__, "0.0.9"))
    command = place.command("preprocess", SMALL, input=place.uri("videos"), output=place.uri("never"))
    done = place.hosts[1].run(command, RAY_ADDRESS=place.address)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(
        rf"node {NETWORK}\.4 runs arlon-ray 0\.0\.9 \(code \w+\), but this job is {__version__}", done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_host_with_another_ray_is_refused_by_ray(place: Place) -> None:
    import ray

    version = Path(ray.__file__).parent / "_version.py"
    place.hosts[3].replace(version, version.read_text().replace(ray.__version__, "2.59.0"))
    done = place.hosts[3].run([RAY, "start", f"--address={place.address}", "--num-cpus=1"])
    assert done.returncode != 0
    assert ray.__version__ in done.stdout + done.stderr and "2.59.0" in done.stdout + done.stderr


def test_a_missing_bucket_is_found_before_work_starts(place: Place) -> None:
    output = place.uri("x").replace("runs", "missing")
    command = place.command("preprocess", SMALL, input=place.uri("videos"), output=output)
    done = place.hosts[1].run(command, RAY_ADDRESS="10.255.255.255:1")  # no Ray could be reached
    assert done.returncode == 2, done.stdout + done.stderr
    assert "NO_SUCH_BUCKET" in done.stderr and output in done.stderr and len(done.stderr.strip().splitlines()) == 1
