"""What the tests of deploy/ share: its YAML, KubeRay's schemas, and commands read as the jobs read them."""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.command_line import read_config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "schemas"
#: Where every pod and every machine sees the shared folder.
SHARED = "/mnt/arlon"


def documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def ray_manifests() -> dict[str, dict[str, Any]]:
    """Every RayJob, RayCluster and RayService of deploy/kuberay, by file name."""
    found = {path.stem: documents(path) for path in sorted(KUBERAY.glob("*.yaml"))}
    return {name: parts[0] for name, parts in found.items() if parts[0]["apiVersion"] == "ray.io/v1"}


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Its RayClusterSpec."""
    spec: dict[str, Any] = manifest["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def containers(node: Any) -> Iterator[dict[str, Any]]:
    """Every container in a manifest."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "containers":
                yield from value
            else:
                yield from containers(value)
            if name == "container":
                yield value
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


@functools.cache
def kuberay_schema(kind: str) -> dict[str, Any]:
    """The schema of a custom resource, closed: a field that it does not name is refused (Kubernetes would drop it)."""
    file = SCHEMAS / f"ray.io_{kind.lower()}s.yaml.gz"
    definition = yaml.load(gzip.decompress(file.read_bytes()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    _close(schema)
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def _close(schema: dict[str, Any]) -> None:
    properties = schema.get("properties", {})
    if properties and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema["additionalProperties"] = False
    more = schema.get("additionalProperties")
    for each in [*properties.values(), schema.get("items"), more]:
        if isinstance(each, dict):
            _close(each)


class _Parsed(Exception):
    """Carries what a job's parser made of its flags, past all that the job would do with it."""


def parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the job's own parser makes of "python jobs/X.py …"; its configuration is read too.

    Raises SystemExit for flags, and ConfigError for settings, that the job would refuse.
    """
    python, script, *flags = shlex.split(command)
    assert python == "python"
    assert (ROOT / script).is_file(), script
    module = importlib.import_module(re.sub(r"\.py$", "", script).replace("/", "."))
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
        raise _Parsed(parse(parser, *given))

    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", [script, *flags])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(_Parsed) as caught:
            module.main()
    arguments: argparse.Namespace = caught.value.args[0]
    arguments.resolved = read_config(arguments)
    return arguments


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    (line,) = re.findall(rf"(?m)^{package}==(\S+)$", (ROOT / "constraints.txt").read_text())
    return str(line)
