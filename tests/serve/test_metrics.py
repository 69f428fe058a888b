"""What Prometheus is told, that the dashboard shows all of it, and the trace of a video."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from serve.logs import REQUEST_ID, JsonLines, RequestIdFilter, log_stage, on_behalf_of, set_up_logging
from serve.metrics import FIGURES, PREFIX, MemoryRecorder, Metrics, RayRecorder
from serve.schema import SegmentState, SegmentTimes, Video
from serve.tracing import trace_of

BOARD = Path(__file__).parents[2] / "docs" / "grafana" / "serving.json"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def everything(metrics: Metrics) -> None:
    """Say one thing of each kind."""
    metrics.queue(3, 2)
    metrics.first_segment(1.5)
    for stage in ("ar", "dit", "decode"):
        metrics.segment(stage, 0.5)  # type: ignore[arg-type]
    metrics.tokens(40)
    metrics.tokens(0)
    metrics.batch("dit", 4)
    metrics.finished("completed")
    metrics.failure("deadline_exceeded")
    metrics.failure("generation_failed", "rendering")
    metrics.exchanged("refused")
    metrics.finished("failed")
    metrics.tenant_queue("studio", 2, 1)
    metrics.tenant_finished("studio", "completed")
    metrics.refused("other", "queue_full")
    metrics.waited("studio", 2.5)
    metrics.request("GET", "/v1/videos/{video_id}", 200, 0.01)


def test_everything_said_is_recorded() -> None:
    recorder = MemoryRecorder()
    everything(Metrics(recorder))
    tenants = {("tenant_queue_length", "studio"): 2, ("tenant_running", "studio"): 1}
    assert recorder.gauges == {("queue_length",): 3, ("running",): 2, **tenants}
    assert recorder.counters == {
        ("ar_tokens",): 40,
        ("finished", "completed"): 1,
        ("finished", "failed"): 1,
        ("failures", "deadline_exceeded", ""): 1,
        ("failures", "generation_failed", "rendering"): 1,
        ("bundle_changes", "refused"): 1,
        ("tenant_finished", "studio", "completed"): 1,
        ("tenant_refused", "other", "queue_full"): 1,
        ("requests", "GET", "/v1/videos/{video_id}", "200"): 1,
    }
    assert recorder.values == {
        ("first_segment_seconds",): [1.5],
        ("segment_seconds", "ar"): [0.5],
        ("segment_seconds", "dit"): [0.5],
        ("segment_seconds", "decode"): [0.5],
        ("batch_size", "dit"): [4],
        ("tenant_wait_seconds", "studio"): [2.5],
        ("request_seconds", "GET", "/v1/videos/{video_id}"): [0.01],
    }
    assert {name for name, *_ in [*recorder.gauges, *recorder.counters, *recorder.values]} == set(FIGURES)


def exported_names() -> set[str]:
    return {f"ray_{PREFIX}{name}{end}" for name, figure in FIGURES.items() for end in SUFFIXES[figure.kind]}


def test_the_dashboard_shows_every_figure_and_no_other() -> None:
    board = json.loads(BOARD.read_text())
    shown = set(re.findall(rf"ray_{PREFIX}\w+", json.dumps(board["panels"])))
    assert shown <= exported_names()
    bare = {re.sub(r"_(total|bucket|sum|count)$", "", name.removeprefix(f"ray_{PREFIX}")) for name in shown}
    assert bare == set(FIGURES)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places) and all(panel["targets"] and panel["title"] for panel in board["panels"])


@pytest.mark.ray
@pytest.mark.slow
def test_prometheus_finds_them_where_it_finds_ray() -> None:
    import ray

    from arlon_ray.config import load_config
    from jobs.ray_session import connect

    with connect(load_config("tiny")):
        everything(Metrics(RayRecorder()))
        (node,) = ray.nodes()
        place = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for _ in range(30):  # Ray exports every few seconds
            exported = urllib.request.urlopen(place, timeout=10).read().decode()
            missing = {name for name in exported_names() if not re.search(rf"^{name}(\{{| )", exported, re.MULTILINE)}
            if not missing:
                break
            time.sleep(1)
    assert not missing
    assert re.search(rf'ray_{PREFIX}segment_seconds_count\{{[^}}]*stage="dit"[^}}]*\}} 1', exported)


def video(**times: Any) -> Video:
    return Video(
        id="video_1", model="m", created_at=1, seconds="1", size="16x16", prompt="a", seed=0,
        segments=[SegmentState(index=0, prompt="a", frames=34, seed=0)], timings=[SegmentTimes(index=0, **times)],
    )  # fmt: skip


def test_a_video_has_a_trace() -> None:
    done = video(ar_start_s=0.0, ar_s=1.0, dit_start_s=1.0, dit_s=2.5, decode_start_s=3.5, decode_s=0.5)
    trace = json.loads(json.dumps(trace_of(done, "req_1")))
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    bars = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(names[bar["tid"]], bar["name"], bar["ts"], bar["dur"]) for bar in bars] == [
        ("ar", "segment 0", 0.0, 1e6),
        ("dit", "segment 0", 1e6, 2.5e6),
        ("decode", "segment 0", 3.5e6, 0.5e6),
    ]
    assert trace["otherData"]["request_id"] == "req_1" and trace["otherData"]["id"] == "video_1"
    begun = trace_of(video(ar_start_s=0.0, ar_s=1.0, dit_start_s=1.0))
    assert [event["cat"] for event in begun["traceEvents"] if event["ph"] == "X"] == ["ar"]
    assert not [event for event in trace_of(video())["traceEvents"] if event["ph"] == "X"]


def test_lines_are_text_or_json_and_carry_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("serve")
    before = logger.handlers, logger.level, logger.propagate
    try:
        set_up_logging("text", "info")
        with on_behalf_of("req_7"):
            logging.getLogger("serve.guard").warning("look")
        logging.getLogger("serve.guard").debug("too much")
        set_up_logging("json", "debug")
        log_stage("req_8", "video_1", "ar", 3, 0.25)
        logging.getLogger("serve.guard").debug("a\nb")
    finally:
        logger.handlers, logger.level, logger.propagate = before
    text, stage, detail = capsys.readouterr().err.splitlines()
    assert text.endswith("WARNING serve.guard req_7 look")
    assert json.loads(stage) | {"time": ""} == {
        "time": "", "level": "INFO", "logger": "serve.stages", "request_id": "req_8",
        "message": "request_id req_8 video_1 segment 3 stage ar 0.250 s",
        "job": "video_1", "stage": "ar", "segment": 3, "seconds": 0.25,
    }  # fmt: skip
    assert json.loads(detail)["message"] == "a\nb" and json.loads(detail)["request_id"] == "-"
    assert REQUEST_ID.get() == ""


def test_a_record_keeps_the_request_that_it_has() -> None:
    record = logging.makeLogRecord({"msg": "a", "request_id": "given"})
    assert RequestIdFilter().filter(record) and json.loads(JsonLines().format(record))["request_id"] == "given"
