"""docs/grafana/alerts.yaml: metrics that there are, rules that fire when they should, and what to do for each."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from jobs.ray_metrics import metric_name
from serve.metrics import FIGURES, PREFIX
from tests.deploy.manifests import ROOT

ALERTS = ROOT / "docs" / "grafana" / "alerts.yaml"
CASES = Path(__file__).parent / "alerts_test.yaml"
PAGE = ROOT / "docs" / "operations.md"
ENDS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool on this machine: apt-get install prometheus")


def rules() -> dict[str, dict[str, Any]]:
    """Every alert by its name."""
    found = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in found}) == len(found)
    return {rule["alert"]: rule for rule in found}


@cache
def of_ray() -> str:
    """What Ray's own dashboards ask for: these are metrics that it exports."""
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return "\n".join(path.read_text() for path in folder.glob("*.py"))


def exported(name: str) -> bool:
    """Whether the service, a training, or Ray has such a metric."""
    if name.startswith(f"ray_{PREFIX}"):
        ours = {f"ray_{PREFIX}{figure}{end}" for figure, what in FIGURES.items() for end in ENDS[what.kind]}
        return name in ours
    if name.startswith("ray_arlon_train_"):
        return name in {f"ray_{metric_name(figure)}" for figure in ("step", "data_wait")}
    return re.search(rf"\b{name}\b", of_ray()) is not None


@pytest.mark.parametrize("alert", rules())
def test_it_asks_for_metrics_that_there_are(alert: str) -> None:
    names = re.findall(r"\bray_\w+", rules()[alert]["expr"])
    assert names and all(exported(name) for name in names), names
    assert not exported("ray_arlon_serve_nothing") and not exported("ray_nothing")


@pytest.mark.parametrize("alert", rules())
def test_the_page_says_what_to_do(alert: str) -> None:
    rule = rules()[alert]
    assert rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["summary"]
    place, anchor = rule["annotations"]["runbook"].split("#")
    assert ROOT / place == PAGE and anchor == alert.lower()
    # as GitHub makes an anchor of a heading
    headings = re.findall(r"^#+ (.+)$", PAGE.read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_alert_has_a_time_when_it_fires_and_one_when_it_does_not() -> None:
    tested = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in tested if case["exp_alerts"]}
    silent = {case["alertname"] for case in tested if not case["exp_alerts"]}
    assert fires == silent == set(rules())


@needs_promtool
def test_prometheus_takes_them_and_they_fire_when_they_should(tmp_path: Path) -> None:
    checked = subprocess.run([str(PROMTOOL), "check", "rules", str(ALERTS)], capture_output=True, text=True)
    assert checked.returncode == 0 and f"{len(rules())} rules found" in checked.stdout, checked.stdout + checked.stderr
    cases = tmp_path / "cases.yaml"
    cases.write_text(CASES.read_text().replace("ALERTS", str(ALERTS)))
    tested = subprocess.run([str(PROMTOOL), "test", "rules", str(cases)], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr
