"""Spans of a request's work, which go on when it has long been answered."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from arlon_ray.config import ConfigError
from arlon_ray.generation import default_options
from jobs.command_line import BOX
from serve.app import check_exporter
from serve.main import Arguments, application
from serve.otlp import processors
from serve.tracing import span, traceparent, worked
from serve.work import JOB, Job
from tests.serve.play import play
from tests.serve.stages import FakeStages, small_config

Spans = InMemorySpanExporter


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    """All spans that have ended."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("serve.tracing._tracer", lambda: provider.get_tracer("arlon"))
    return exporter


def named(spans: Spans, name: str) -> list[ReadableSpan]:
    return [each for each in spans.get_finished_spans() if each.name == f"arlon.{name}"]


async def ended(client: httpx.AsyncClient, video: str) -> dict[str, Any]:
    await client.get(f"/v1/videos/{video}/events")
    return (await client.get(f"/v1/videos/{video}")).json()


def test_nothing_is_traced_where_nobody_asked() -> None:
    with span("video", job="video_1"):
        worked("dit", "video_1", 0, 1.0, 2.0)
        assert traceparent() == ""


def test_work_for_a_call_that_is_not_traced_is_no_trace_of_its_own(spans: Spans) -> None:
    worked("dit", "video_1", 0, 1.0, 2.0)
    assert not spans.get_finished_spans()


def test_a_span_has_the_times_that_it_is_given(spans: Spans) -> None:
    with span("video", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"):
        assert traceparent().startswith("00-0af7651916cd43dd8448eb211c80319c-")
        worked("dit", "video_1", 3, 100.25, 0.5)
    (dit,), (video,) = named(spans, "dit"), named(spans, "video")
    assert (dit.start_time, dit.end_time) == (100_250_000_000, 100_750_000_000)
    assert dict(dit.attributes or {}) == {"arlon.job": "video_1", "arlon.segment": 3}
    assert dit.parent is not None and dit.parent.span_id == video.context.span_id  # type: ignore[union-attr]
    assert video.parent is not None and f"{video.parent.span_id:016x}" == "b7ad6b7169203331"


def test_a_lost_call_is_a_span_of_its_own(spans: Spans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.orchestrator._PAUSE_S", 0.0)

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.losses = ["render", "plan"]
        with span("caller"):
            caller = traceparent()
            video = (await client.post("/v1/videos", json={"prompt": "a ball", "num_segments": 2})).json()["id"]
        assert (await ended(client, video))["status"] == "completed"
        (whole,) = named(spans, "video")
        assert f"{whole.context.trace_id:032x}" == caller.split("-")[1]  # type: ignore[union-attr]
        assert whole.status.is_unset
        for call in ("rendering", "planning"):
            of_first = [each for each in named(spans, call) if dict(each.attributes or {})["arlon.segment"] == 0]
            assert [dict(each.attributes or {})["arlon.again"] for each in of_first] == [0, 1]
            assert [each.status.description is not None for each in of_first] == [True, False], call
            assert all(each.parent and each.parent.trace_id == whole.context.trace_id for each in of_first)  # type: ignore[union-attr]

    play(scenario, tmp_path)


def test_a_video_that_fails_is_marked(spans: Spans, tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.fail_at = 0
        video = (await client.post("/v1/videos", json={"prompt": "a ball"})).json()["id"]
        assert (await ended(client, video))["status"] == "failed"
        (whole,), (rendering,) = named(spans, "video"), named(spans, "rendering")
        assert not whole.status.is_ok and "rendering failed (MemoryError)" in (whole.status.description or "")
        assert not rendering.status.is_ok and rendering.events[0].name == "exception"

    play(scenario, tmp_path)


def test_what_is_deleted_is_marked_as_cancelled(spans: Spans, tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        reached = stages.hang_at(0)
        video = (await client.post("/v1/videos", json={"prompt": "a ball"})).json()["id"]
        await reached.wait()
        await client.delete(f"/v1/videos/{video}")
        for name in ("rendering", "video"):
            (cut,) = named(spans, name)
            assert dict(cut.attributes or {})["arlon.cancelled"] is True

    play(scenario, tmp_path)


def test_what_goes_on_after_a_restart_goes_on_in_the_same_trace(spans: Spans, tmp_path: Path) -> None:
    async def before(client: httpx.AsyncClient, stages: FakeStages) -> None:
        reached = stages.hang_at(1)
        with span("caller"):
            await client.post("/v1/videos", json={"prompt": "a ball", "num_segments": 2})
        await reached.wait()

    async def after(client: httpx.AsyncClient, stages: FakeStages) -> None:
        (video,) = (await client.get("/v1/videos")).json()["data"]
        assert (await ended(client, video["id"]))["status"] == "completed"

    play(before, tmp_path)
    play(after, tmp_path)
    (caller,), (cut, whole) = named(spans, "caller"), named(spans, "video")
    assert "arlon.cancelled" in dict(cut.attributes or {}) and "arlon.cancelled" not in dict(whole.attributes or {})
    for each in (cut, whole):
        assert each.parent is not None and each.parent.span_id == caller.context.span_id  # type: ignore[union-attr]


def test_a_segment_that_is_planned_anew_is_of_the_request_that_asked_for_it(spans: Spans, tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        with span("first"):
            draft = (await client.post("/v1/drafts", json={"prompt": "a ball", "num_segments": 2})).json()["id"]
        await client.get(f"/v1/drafts/{draft}/events")
        with span("second"):
            headers = {"x-request-id": "again"}
            answer = await client.post(f"/v1/drafts/{draft}/segments/1/reroll", json={"seed": 5}, headers=headers)
        assert answer.status_code == 200
        await client.get(f"/v1/drafts/{draft}/events")
        asked = [named(spans, name)[0].context.trace_id for name in ("first", "second")]  # type: ignore[union-attr]
        assert [each.context.trace_id for each in named(spans, "draft")] == asked  # type: ignore[union-attr]
        assert dict(named(spans, "draft")[1].attributes or {})["arlon.request_id"] == "again"

    play(scenario, tmp_path)


def test_a_job_that_an_earlier_version_kept_has_no_trace() -> None:
    kept = JOB.dump_python(Job("video_1", ("a ball",), 0, default_options(small_config().sampling)), mode="json")
    del kept["traceparent"]
    assert JOB.validate_python(kept).traceparent == ""


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("serve.tracing", "expected MODULE:FUNCTION"),
        (":processors", "expected MODULE:FUNCTION"),
        (".x:y", "package"),
        ("serve.tracing:nothing", "no attribute 'nothing'"),
        ("serve.nowhere:processors", "No module named 'serve.nowhere'"),
        ("serve.tracing:span", "expected a function without arguments"),
        ("builtins:list", "expected a function without arguments"),
    ],
)
def test_an_exporter_that_is_none(path: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"serve.trace_exporter={path}: .*{why}"):
        check_exporter(path)


def test_step_news_of_many_requests_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(OTLPSpanExporter, "export", lambda _, spans: sent.extend(each.name for each in spans))
    (processor,) = processors()
    provider = TracerProvider()
    provider.add_span_processor(processor)
    for name in ("route_to_replica VideoAPI told", "replica_handle_request VideoAPI told", "arlon.dit"):
        provider.get_tracer("ray").start_span(name).end()
    processor.force_flush()
    assert sent == ["arlon.dit"]


def test_the_exporter_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    check_exporter("")
    check_exporter("serve.otlp:processors")
    monkeypatch.delitem(sys.modules, "serve.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install -c constraints.txt -e '\.\[otlp\]'"):
        check_exporter("serve.otlp:processors")


def test_serve_deploy_says_where_the_exporter_belongs() -> None:
    asked = Arguments(bundle=str(BOX), data="d", set=["serve.trace_exporter=serve.otlp:processors"])
    with pytest.raises(ConfigError, match="tracing_config"):
        application(asked)
