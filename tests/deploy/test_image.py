"""deploy/Dockerfile and what is sent to builds and clusters. No image is built: that needs a daemon and gigabytes."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, get_excludes_from_ignore_files

from tests.deploy.manifests import DEPLOY, ROOT, pinned

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
#: Its instructions, each on one line, without comments.
LINES = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", DOCKERFILE)).splitlines()


def copied() -> list[str]:
    """What the Dockerfile copies from the repository."""
    return [name for line in LINES if line.startswith("COPY ") for name in line.split()[1:-1]]


def test_what_is_copied_exists_and_is_sent_to_the_build() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in copied())
    assert sorted(copied()) == sorted(allowed)


def test_all_packages_of_the_project_are_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]:
        assert any(fnmatch.fnmatch(name, pattern) for name in copied()), pattern
    assert project["project"]["readme"] in copied()


def test_it_is_built_for_both_devices_from_the_pinned_versions() -> None:
    assert "ARG DEVICE=cpu" in LINES
    installs = re.findall(r"pip install[^&]*", "\n".join(LINES))
    assert len(installs) == 3
    for install in installs:
        assert "-c constraints.txt" in install or "--no-deps -e ." in install
    (base,) = [line.split()[1] for line in LINES if line.startswith("FROM ")]
    assert base.startswith(f"python:{sys.version_info.major}.{sys.version_info.minor}-")
    assert pinned("psycopg2-binary")  # beyond the project's own dependencies, and pinned as they are


def test_its_commands_are_shell() -> None:
    for line in (line for line in LINES if line.startswith("RUN ")):
        assert subprocess.run(["sh", "-n", "-c", line.removeprefix("RUN ")]).returncode == 0, line


def test_the_requirements_that_it_installs_are_the_projects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = [line for line in LINES if "tomllib" in line]
    program = shlex.split(line.removeprefix("RUN "))[2]
    monkeypatch.chdir(ROOT)
    exec(program, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_what_a_submitted_job_takes_along_is_small_and_holds_the_jobs() -> None:
    """`ray job submit --working-dir .` refuses more than 100 MiB; Ray's own reading of .rayignore."""
    ignored = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    sent: dict[str, int] = {}

    def walk(folder: Path) -> None:
        for path in folder.iterdir():
            if any(match(path) for match in ignored) or path.is_symlink():
                continue
            if path.is_dir():
                # as Ray does, it asks of a folder with and without the slash of its patterns
                if not any(match(path / "x") for match in ignored):
                    walk(path)
            else:
                sent[str(path.relative_to(ROOT))] = path.stat().st_size

    walk(ROOT)
    assert {
        "jobs/train_dit.py",
        "serve/web/index.html",
        "weights/tiny/vae/model.safetensors",
        "constraints.txt",
    } <= set(sent)
    assert not any(name.startswith((".git/", ".venv/", "runs/", ".hypothesis/")) for name in sent)
    assert sum(sent.values()) < GCS_STORAGE_MAX_SIZE / 2, sorted(sent.items(), key=lambda each: -each[1])[:5]


def test_no_file_names_a_registry() -> None:
    for path in [*DEPLOY.rglob("*"), ROOT / "cluster.yaml", ROOT / ".dockerignore"]:
        if path.is_file() and "__pycache__" not in path.parts:
            for image in re.findall(r"(?:image:|FROM|-t) (\S+)", path.read_text()):
                host = image.split("/")[0] if "/" in image else ""
                assert "." not in host and ":" not in host, f"{path}: {image}"


def test_every_placeholder_is_explained() -> None:
    explained = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (DEPLOY / "README.md").read_text()))
    files = [*DEPLOY.rglob("*.yaml"), DEPLOY / "Dockerfile", ROOT / "cluster.yaml"]
    texts = {
        path: "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in path.read_text().splitlines()) for path in files
    }
    inside = re.compile(r"(?<=[/:@ \[,(=])([A-Z]+(?:_[A-Z0-9]+)+|REGISTRY)(?=[/:\s\],}\\]|$)", re.M)
    used = {name for text in texts.values() for name in inside.findall(text)}
    environment = {name for text in texts.values() for name in re.findall(r"\b([A-Z_]+)=|name: ([A-Z_]+)[,}]", text)}
    names = {name for pair in environment for name in pair if name}
    assert {"REGISTRY", "NFS_HOST", "PROJECT_ID", "HEAD_IP", "SHARED_CLASS", "POSTGRES_HOST"} <= used
    assert used - names <= explained
