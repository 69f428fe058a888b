"""Forms: nested names as the same object in JSON, names that mean nothing, and routes that take no form."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from serve.forms import nested
from serve.schema import RequestError
from tests.serve.play import play, post, until
from tests.serve.stages import FakeStages


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([], {}),
        ([("prompt", "1"), ("seed", "1"), ("baseline", "true"), ("x", "a")],
         {"prompt": "1", "seed": 1, "baseline": True, "x": "a"}),
        ([("video[id]", "123"), ("a[b][c]", "1"), ("a[b][d]", "2")],
         {"video": {"id": "123"}, "a": {"b": {"c": 1, "d": 2}}}),
        ([("a[]", "1"), ("b", "2"), ("a[]", "x")], {"a": [1, "x"], "b": 2}),
        ([("a[b][]", "1"), ("a[b][]", "2"), ("a[c]", "3")], {"a": {"b": [1, 2], "c": 3}}),
        ([("a[][b][c]", "1"), ("a[][b][d]", "2"), ("a[][b][c]", "3"), ("a[][b][d]", "4")],
         {"a": [{"b": {"c": 1, "d": 2}}, {"b": {"c": 3, "d": 4}}]}),
        ([("a", '[{"b": 1}]')], {"a": [{"b": 1}]}),
        ([("a[0]", "x"), ("a[1]", "y")], {"a": {"0": "x", "1": "y"}}),
    ],
)  # fmt: skip
def test_names_spell_an_object(fields: list[tuple[str, str]], expected: dict) -> None:
    assert nested(fields) == expected


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("p1 s1 p2 s2", [{"p": 1, "s": 1}, {"p": 2, "s": 2}]),
        ("p1 p2 s1 s2", [{"p": 1, "s": 1}, {"p": 2, "s": 2}]),  # as the OpenAI client writes it
        ("p1 p2 p3", [{"p": 1}, {"p": 2}, {"p": 3}]),
        ("p1 s1", [{"p": 1, "s": 1}]),
        ("p1 s1 p2", [{"p": 1, "s": 1}, {"p": 2}]),
        ("p1 p2 s2 p3", [{"p": 1}, {"p": 2, "s": 2}, {"p": 3}]),
        ("p1 s1 c1 p2 s2 p3 s3 c3", [{"p": 1, "s": 1, "c": 1}, {"p": 2, "s": 2}, {"p": 3, "s": 3, "c": 3}]),
    ],
)
def test_fields_belong_to_elements_of_a_list(order: str, expected: list[dict]) -> None:
    assert nested((f"a[][{field[0]}]", field[1]) for field in order.split()) == {"a": expected}


@pytest.mark.parametrize(
    ("names", "param", "message"),
    [
        ([""], "", "malformed"),
        (["[a]"], "[a]", "malformed"),
        (["a["], "a[", "malformed"),
        (["a]"], "a]", "malformed"),
        (["a[b"], "a[b", "malformed"),
        (["a[b]c"], "a[b]c", "malformed"),
        (["a[[b]]"], "a[[b]]", "malformed"),
        (["a[b][c][d][e][f]"], "a[b][c][d][e][f]", "at most 4"),
        (["a" + "[b]" * 20_000], "a" + "[b]" * 21, "at most 4"),
        (["a[][]"], "a[][]", "lists within lists"),
        (["a[][b][]"], "a[][b][]", "lists within lists"),
        (["a", "a"], "a", "twice"),
        (["a[b]", "a[b]"], "a[b]", "twice"),
        (["a", "a[b]"], "a", "value in one field and its object in another"),
        (["a[]", "a[b]"], "a", "list in one field and its object in another"),
        (["a[b]", "a[]"], "a", "object in one field and its list in another"),
        (["a[]", "a[][b]"], "a[]", "value in one field and its object in another"),
        (["a[][b]", "a[][b][c]"], "a[][b]", "value in one field and its object in another"),
        (["a[][b]", "a[][b]", "a[][c]"], "a[][c]", "1 of 2 elements have it"),
        (["a[][c]", "a[][b]", "a[][b]"], "a[][c]", "1 of 2 elements have it"),
    ],
)
def test_names_that_mean_nothing_or_two_things(names: list[str], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        nested((name, "1") for name in names)
    assert (refused.value.param, refused.value.status) == (param[:64], 400)


def test_a_form_asks_for_what_json_asks_for(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        parts = {"segments[][prompt]": ["a", "7"], "segments[][cut]": ["false", "true"], "seed": "3"}
        key = {"Idempotency-Key": "k"}
        made = await client.post("/v1/videos", data=parts, headers=key)
        asked = {"segments": [{"prompt": "a"}, {"prompt": "7", "cut": True}], "seed": 3}
        assert (await client.post("/v1/videos", json=asked, headers=key)).json()["id"] == made.json()["id"]
        wrong = await client.post("/v1/videos", data={"segments[][prompt]": ["a", ""]})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "segments.1.prompt")
        unknown = await client.post("/v1/videos", data={"prompt": "a", "video[id]": "x"})
        assert (unknown.json()["error"]["param"], unknown.json()["error"]["code"]) == ("video", "unknown_field")
        many = await client.post(
            "/v1/videos", data={"segments[][prompt]": ["a"] * 60, "segments[][cut]": ["true"] * 60}
        )
        assert len(many.json()["segments"]) == 60

    play(scenario, tmp_path)


def test_an_extension_is_asked_for_with_a_form(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        made = await until(client, (await post(client, prompt="a"))["id"], "completed")
        asked = {"prompt": "b", "video[id]": made["id"], "num_segments": "2"}
        for form in ({"data": asked}, {"files": {name: (None, value) for name, value in asked.items()}}):
            answer = (await client.post("/v1/videos/extensions", **form)).json()  # type: ignore[arg-type]
            assert (answer["extended_from_video_id"], len(answer["segments"])) == (made["id"], 3)
        upload = {"video": ("a.mp4", b"\0\0", "video/mp4")}
        refused = await client.post("/v1/videos/extensions", data={"prompt": "b"}, files=upload)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "video")
        assert "video[id]" in refused.json()["error"]["message"]
        for body, param in (({"prompt": "b"}, "video"), ({"prompt": "b", "video": made["id"]}, "video")):
            wrong = await client.post("/v1/videos/extensions", data=body)
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, param)

    play(scenario, tmp_path)


def test_other_kinds_of_bodies_are_refused_alike(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        jsons = ("/v1/drafts", "/v1/videos/video_0/remix", "/v1/drafts/draft_0/segments/0/reroll")
        for path in ("/v1/videos", "/v1/videos/extensions", *jsons):
            kinds = ["text/plain", "application/xml", ""]
            for kind in [*kinds, "multipart/form-data; boundary=x"] if path in jsons else kinds:
                headers = {"content-type": kind} if kind else {}
                answer = await client.post(path, content=b'{"prompt": "a"}', headers=headers)
                found = answer.status_code, answer.json()["error"]["code"]
                assert found == (415, "unsupported_media_type"), (path, kind)
            broken = await client.post(path, content=b"{", headers={"content-type": "application/json"})
            assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json"), path

    play(scenario, tmp_path)
