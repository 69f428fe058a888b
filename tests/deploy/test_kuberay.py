"""The manifests of deploy/kuberay: KubeRay's schemas, and what no schema sees."""

from __future__ import annotations

import copy
import importlib
import re
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve.main import Arguments, application
from tests.deploy.manifests import (
    KUBERAY,
    ROOT,
    SCHEMAS,
    SHARED,
    cluster_of,
    containers,
    documents,
    kuberay_schema,
    parsed,
    pinned,
    ray_manifests,
)

MANIFESTS = ray_manifests()
JOBS = {name: manifest for name, manifest in MANIFESTS.items() if manifest["kind"] == "RayJob"}
SERVICE = MANIFESTS["service"]
needs_schemas = pytest.mark.skipif(not SCHEMAS.is_dir(), reason="KubeRay's schemas are not beside this checkout")


def test_there_is_a_job_for_every_stage() -> None:
    stages = {"train_vae", "preprocess", "train_vqvae", "extract_tokens", "train_ar", "train_dit", "make_bundle"}
    assert set(JOBS) == stages | {"pipeline"}
    for name, manifest in JOBS.items():
        assert manifest["metadata"]["name"] == "arlon-" + name.replace("_", "-")
        assert manifest["spec"]["entrypoint"].startswith(f"python jobs/{name}.py ")


@needs_schemas
@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberays_schema_accepts_it(name: str) -> None:
    validator = jsonschema.Draft202012Validator(kuberay_schema(MANIFESTS[name]["kind"]))
    assert [error.message for error in validator.iter_errors(MANIFESTS[name])] == []


@needs_schemas
def test_kuberays_schema_refuses_what_is_wrong() -> None:
    """The check can fail: a misspelt field deep inside, a wrong type, a group without its bounds."""

    def misspelt(cluster: dict[str, Any]) -> None:
        cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []

    def wrong_type(cluster: dict[str, Any]) -> None:
        cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0

    def unbounded(cluster: dict[str, Any]) -> None:
        del cluster["workerGroupSpecs"][0]["maxReplicas"]

    for spoil in (misspelt, wrong_type, unbounded):
        manifest = copy.deepcopy(MANIFESTS["train_dit"])
        spoil(cluster_of(manifest))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(kuberay_schema("RayJob")).validate(manifest)


@pytest.mark.parametrize("name", MANIFESTS)
def test_clusters_have_an_idle_head_pools_a_folder_and_tokens(name: str) -> None:
    cluster = cluster_of(MANIFESTS[name])
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for each, group in groups.items():
        pod = group["template"]["spec"]
        tolerated = {toleration["key"] for toleration in pod.get("tolerations", [])}
        gpus = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert gpus == (each == "gpu") == ("nvidia.com/gpu" in tolerated)
        assert (each == "cpu-spot") == ("spot" in tolerated) == (pod.get("nodeSelector") == {"pool": "spot"})
        assert group["minReplicas"] <= group["maxReplicas"]
    for pod in (cluster["headGroupSpec"]["template"]["spec"], *(g["template"]["spec"] for g in groups.values())):
        (container,) = pod["containers"]
        (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
        assert mount == {"name": volume["name"], "mountPath": SHARED}
        (claim,) = documents(KUBERAY / "storage.yaml")
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_images_are_of_this_version_and_device() -> None:
    project = re.search(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert project is not None
    for manifest in MANIFESTS.values():
        for container in containers(manifest):
            device = "gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
            assert container["image"] == f"REGISTRY/arlon-ray:{project[1]}-ray{pinned('ray')}-{device}"


@pytest.mark.parametrize("name", JOBS)
def test_jobs_are_commands_that_the_job_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = JOBS[name]["spec"]
    arguments = parsed(spec["entrypoint"], monkeypatch)
    assert arguments.output.startswith(SHARED + "/")
    config = arguments.resolved
    cluster = cluster_of(JOBS[name])
    gpus = sum(g["maxReplicas"] for g in cluster["workerGroupSpecs"] if g["groupName"] == "gpu")
    if name.startswith("train_"):
        assert config.cluster.max_failures > 10  # the default, 1, is for machines that stay
        assert config.cluster.use_gpu and config.cluster.worker_counts[-1] <= gpus
        pod = next(g for g in cluster["workerGroupSpecs"] if g["groupName"] == "gpu")["template"]["spec"]
        assert config.cluster.cpus_per_worker < int(pod["containers"][0]["resources"]["limits"]["cpu"])
    if name in ("preprocess", "extract_tokens", "pipeline"):
        assert 0 < config.data.encoders * config.data.encoder_gpus <= gpus
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] and spec["ttlSecondsAfterFinished"]
    # only the pipeline's driver must be where the HTTP server is: on the head
    assert spec.get("entrypointNumCpus") == (None if name == "pipeline" else 1)


def test_each_stage_reads_what_the_one_before_has_written(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {name: parsed(manifest["spec"]["entrypoint"], monkeypatch) for name, manifest in JOBS.items()}
    made = {
        "vae": stages["train_vae"].output + "/vae",
        "dataset": stages["preprocess"].output,
        "codec_fine": stages["train_vqvae"].output + "/codec_fine",
        "codec_coarse": stages["train_vqvae"].output + "/codec_coarse",
        "ar": stages["train_ar"].output + "/ar",
        "dit": stages["train_dit"].output + "/dit",
    }
    for name, arguments in stages.items():
        for what, path in made.items():
            given = getattr(arguments, what, None)
            assert given in (path, None), f"{name} --{what}"
    assert stages["extract_tokens"].output == made["dataset"] + "/tokens"
    served = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert served["bundle"] == stages["make_bundle"].output


def test_the_service_is_serve_config_yaml_for_a_cluster() -> None:
    written = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
    config = ServeDeploySchema.model_validate(written)
    (described,) = config.applications
    module, name = described.import_path.split(":")
    assert getattr(importlib.import_module(module), name) is application
    given = Arguments.model_validate({**described.args, "bundle": str(ROOT / "weights" / "tiny")})
    assert application(given)
    assert config.http_options.host == "0.0.0.0" and "serve.host=0.0.0.0" in given.set
    assert not any(setting.startswith("serve.auth") for setting in given.set), "keys are needed"
    assert any(setting.startswith("serve.database_url=postgresql") for setting in given.set)
    here = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    assert written.keys() == here.keys()
    for key in ("name", "route_prefix", "import_path"):
        assert written["applications"][0][key] == here["applications"][0][key]


def test_the_service_outlives_its_head_and_has_no_second_cluster() -> None:
    spec = SERVICE["spec"]
    cluster = cluster_of(SERVICE)
    assert spec["upgradeStrategy"]["type"] == "None"
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert yaml.safe_load(spec["serveConfigV2"])["proxy_location"] == "EveryNode"
    service, redis = documents(KUBERAY / "redis.yaml")
    assert service["spec"]["selector"] == redis["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"] == redis["spec"]["template"]["metadata"]["labels"]
    tolerance = cluster["gcsFaultToleranceOptions"]
    assert tolerance["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    (container,) = containers(redis)
    assert container["env"][0]["valueFrom"] == tolerance["redisPassword"]["valueFrom"]
    (claim,) = redis["spec"]["volumeClaimTemplates"]
    assert container["volumeMounts"][0]["name"] == claim["metadata"]["name"]


def test_every_pod_of_the_service_has_the_databases_password() -> None:
    for container in containers(cluster_of(SERVICE)):
        assert [each["name"] for each in container["env"]] == ["PGPASSWORD"]
    assert "@" in SERVICE["spec"]["serveConfigV2"] and not re.search(r"//\w+:\w+@", SERVICE["spec"]["serveConfigV2"])
