"""Folders of a bucket as folders of this machine: a real S3 server, and two nodes, each with a mirror of its own."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

from arlon_ray import mirror
from arlon_ray.artifact import ArtifactError, finished, load_artifact, save_artifact, whole_folder, write_json
from jobs.command_line import InputError, existing, output_folder
from tests.s3 import endpoint, s3_server

Node = Callable[[str], Path]


@pytest.fixture(scope="module")
def options() -> Iterator[str]:
    """The part of a URI that names the server, which has a bucket "bkt"."""
    with s3_server("bkt") as named:
        yield named


@pytest.fixture
def nodes(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request) -> tuple[Node, Node]:
    """Two functions from a name in the bucket to the path that stands for it, each on a node of its own."""

    def node(root: str) -> Node:
        def there(name: str) -> Path:
            monkeypatch.setenv("ARLON_MIRROR", str(tmp_path / root))
            return mirror.local(f"s3://bkt/{request.node.name}/{name}{options}")

        return there

    return node("one"), node("two")


def saved(path: Path, value: float) -> None:
    save_artifact(path, kind="codec", config={"a": 1}, tensors={"w": torch.full((3,), value)}, key=str(value))


@pytest.mark.parametrize("below", ["", "/run", "/a b/ü%20/c?d"])
def test_a_path_says_what_it_stands_for(below: str) -> None:
    from urllib.parse import quote

    location = f"s3://bucket{quote(below)}?endpoint_override=host:9000&scheme=http"
    path = mirror.local(location)
    assert mirror.origin(path) == location and mirror.local(path) == path
    assert path.name == (below.rpartition("/")[2] or path.name)


def test_a_message_names_the_bucket() -> None:
    path = mirror.local("s3://bucket/run/dataset")
    assert mirror.named(f"{path}: done, see {path / 'x.json'}.") == (
        "s3://bucket/run/dataset: done, see s3://bucket/run/dataset/x.json."
    )
    assert mirror.named("/here/x: done") == "/here/x: done"


def test_what_one_node_writes_another_reads_as_often_as_it_changes(nodes: tuple[Node, Node]) -> None:
    one, two = nodes
    for value in (1.0, 2.0):  # the second has the same names and sizes
        saved(one("codec"), value)
        assert load_artifact(two("codec"), "codec").tensors()["w"].tolist() == [value] * 3
    assert finished(two("codec"), "codec", "2.0") and not finished(two("codec"), "codec", "1.0")
    mirror.remove(one("codec"))
    with pytest.raises(ArtifactError, match="is missing"):
        load_artifact(two("codec"), "codec")
    assert not any(path.is_file() for path in two("codec").rglob("*"))


def test_a_folder_is_replaced_as_a_whole(nodes: tuple[Node, Node]) -> None:
    one, two = nodes
    for names in (("a/x", "b"), ("b", "c")):
        with whole_folder(one("bundle")) as folder:
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)
        found = mirror.pull(two("bundle"))
        assert sorted(path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()) == [*names]


def test_a_push_that_breaks_off_leaves_nothing_that_looks_whole(nodes: tuple[Node, Node]) -> None:
    one, two = nodes
    saved(one("codec"), 1.0)
    folder = one("codec")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("nowhere")
    (folder / "lineage.json").write_text("{}")
    with pytest.raises(OSError, match="config"):
        mirror.push(folder)
    assert not mirror.exists(two("codec") / "lineage.json") and mirror.exists(two("codec") / "model.safetensors")


def test_an_upload_that_is_stopped_leaves_no_shorter_file(nodes: tuple[Node, Node]) -> None:
    one, two = nodes
    path, size = one("weights"), 16 << 20
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for seconds in (0.01, 0.05, 0.2):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with suppress(KeyboardInterrupt):
                mirror.upload(path, path)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert not mirror.exists(two("weights")) or len(mirror.read(two("weights"))) == size
            mirror.remove(two("weights"))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_is_half_written_stays_here(nodes: tuple[Node, Node]) -> None:
    one, two = nodes
    folder = one("folder") / ".x.1234.partial"
    folder.mkdir(parents=True)
    write_json(folder / "a.json", {})
    write_json(one("folder") / "b.json", {"b": 1})
    assert mirror.origin(folder) is None
    assert [path.name for path in mirror.glob(two("folder"), "*")] == ["b.json"]
    assert json.loads(mirror.read(two("folder") / "b.json")) == {"b": 1}


def test_looking_fetches_nothing(nodes: tuple[Node, Node]) -> None:
    one, two = nodes
    for name in ("p=1/a.parquet", "p=2/b.parquet", "p=2/c.txt"):
        path = one("data") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        mirror.push(path)
    there = two("data")
    assert [path.name for path in mirror.glob(there, "p=*/*.parquet")] == ["a.parquet", "b.parquet"]
    assert [path.name for path in mirror.glob(there, "*")] == ["p=1", "p=2"]
    assert mirror.exists(there / "p=1") and not mirror.exists(there / "p=3")
    assert mirror.readable(there / "p=1" / "a.parquet").read(5) == b"p=1/a"
    assert not there.exists()


def test_moving_within_the_bucket(nodes: tuple[Node, Node]) -> None:
    one, two = nodes
    one("work").mkdir(parents=True)
    write_json(one("work") / "a.json", {})
    mirror.move(one("work") / "a.json", one("ready") / "b.json")
    assert mirror.pull(two("ready") / "b.json").read_text() == "{}\n"
    assert not mirror.exists(two("work") / "a.json")


def test_a_job_with_wrong_keys_ends_in_one_line(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server looks at keys from the moment that it is told to."""
    monkeypatch.setenv("ARLON_MIRROR", str(tmp_path))
    output = f"s3://bkt/run{options}"
    switch = f"{endpoint(options)}/moto-api/reset-auth"
    httpx.post(switch, content=b"0").raise_for_status()
    try:
        with pytest.raises(InputError, match=r"cannot be written to.*AWS Error") as raised:
            output_folder(argparse.Namespace(output=output))
        with pytest.raises(InputError, match=r"--dataset s3.*cannot be reached.*AWS Error"):
            existing(output, "--dataset")
    finally:
        httpx.post(switch, content=b"inf").raise_for_status()
    assert mirror.named(str(raised.value)).startswith(f"--output {output}: ")
    assert output_folder(argparse.Namespace(output=output)) == mirror.local(output)


def test_a_bucket_that_is_not_there(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARLON_MIRROR", str(tmp_path))
    path = mirror.local(f"s3://missing/x{options}")
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        mirror.check_writable(path)
    with pytest.raises(ArtifactError, match="codec artefact"):
        load_artifact(path, "codec")
