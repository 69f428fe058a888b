"""News of denoising steps: soon, not too often, and for all renderings at once."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.handle import DeploymentHandle

from serve.handles import RemotePermit, RemoteTold
from serve.step_news import StepNews
from tests.serve.play import driven


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.step_news.PAUSE_S", 0.1)


@driven
async def test_the_first_step_at_once_and_then_the_newest() -> None:
    heard: list[tuple[int, int]] = []

    async def told(index: int, step: int) -> None:
        heard.append((index, step))

    news = StepNews()
    news.note(told, 2, 1)
    await asyncio.sleep(0.02)
    assert heard == [(2, 1)]
    for step in (2, 3, 4):
        news.note(told, 2, step)
    await asyncio.sleep(0.02)
    assert heard == [(2, 1)]
    await asyncio.sleep(0.15)
    assert heard == [(2, 1), (2, 4)]
    news.note(told, 2, 5)
    news.forget(told)
    await asyncio.sleep(0.15)
    assert heard[2:] in ([], [(2, 5)])
    await asyncio.sleep(0.15)
    news.note(told, 3, 1)  # it was quiet meanwhile: at once again
    await asyncio.sleep(0.02)
    assert heard[-1] == (3, 1)


@driven
async def test_all_renderings_are_told_of_in_one_call() -> None:
    calls: list[list[tuple[str, int, int]]] = []

    async def arrived(news: list[tuple[str, int, int]]) -> None:
        calls.append(news)

    api: Any = SimpleNamespace(told=SimpleNamespace(remote=arrived))
    renderings, news = [RemoteTold(api, name) for name in "abc"], StepNews()
    for told in renderings:
        news.note(told, 0, 1)
    await asyncio.sleep(0.02)
    assert calls == [[("a", 0, 1), ("b", 0, 1), ("c", 0, 1)]]


@driven
async def test_news_that_do_not_arrive_end_nothing() -> None:
    heard = []

    async def told(index: int, step: int) -> None:
        heard.append(step)
        if step == 1:
            raise ConnectionError("away for a while")

    news = StepNews()
    news.note(told, 0, 1)
    await asyncio.sleep(0.02)
    news.note(told, 0, 2)
    await asyncio.sleep(0.15)
    assert heard == [1, 2]


def test_what_arrives_shares_one_handle() -> None:
    """Each handle is a router, which Ray keeps as long as the process lives."""
    sent = [RemoteTold(DeploymentHandle("API", "app"), "a"), RemotePermit(DeploymentHandle("API", "app"), "b")]
    first, second = (pickle.loads(pickle.dumps(each)) for each in sent)
    assert (type(first), first.name, type(second), second.name) == (RemoteTold, "a", RemotePermit, "b")
    assert first.api is second.api
    assert (first.api.deployment_name, first.api.app_name) == ("API", "app")
