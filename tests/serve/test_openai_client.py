"""The official OpenAI client, unchanged, against the service behind a real HTTP server."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from arlon_ray.generation.video import read_video
from tests.serve.live import serving
from tests.serve.stages import FakeStages

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's own, of OpenAI's service


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serving(tmp_path_factory.mktemp("served"), "serve.max_queued=1", kind=FakeStages) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def picture(grey: int) -> io.BytesIO:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), (grey, grey, grey)).save(file, "PNG")
    file.name, _ = "picture.png", file.seek(0)
    return file


def test_create_and_poll_and_download(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(prompt="a", seconds="4", size="16x16", model="tiny", poll_interval_ms=20)  # type: ignore[arg-type]
    assert (video.status, video.progress, video.object) == ("completed", 100, "video")
    assert float(video.seconds) >= 4
    frames = read_video(io.BytesIO(client.videos.download_content(video.id).read()))
    assert len(frames) == round(float(video.seconds) * 16)
    for variant in ("thumbnail", "spritesheet"):
        png = Image.open(io.BytesIO(client.videos.download_content(video.id, variant=variant).read()))  # type: ignore[arg-type]
        assert png.size == ((16, 16) if variant == "thumbnail" else (8 * 16, 6 * 16))
    client.videos.delete(video.id)


def test_what_goes_beyond(client: openai.OpenAI) -> None:
    beyond = {"segments": [{"prompt": "a"}, {"prompt": "b"}], "seed": 7, "guidance_scale": 3.0, "negative_prompt": "c"}
    response = client.post("/videos", body=beyond, cast_to=openai.types.Video)
    video = client.videos.poll(response.id, poll_interval_ms=20)
    assert (video.status, video.seed, len(video.segments)) == ("completed", 7, 2)  # type: ignore[attr-defined]


def test_what_goes_beyond_in_the_clients_own_forms(client: openai.OpenAI) -> None:
    parts = [{"prompt": "a", "seconds": 2, "cut": False}, {"prompt": "7", "seconds": 1, "cut": True}]
    video = client.videos.create(prompt=openai.omit, extra_body={"segments": parts, "seed": 7})  # type: ignore[arg-type]
    asked = client.post("/videos", body={"segments": parts, "seed": 7}, cast_to=openai.types.Video)
    for made in (video, asked):
        client.videos.poll(made.id, poll_interval_ms=20)
    assert video.segments == asked.segments and video.seed == 7  # type: ignore[attr-defined]
    assert [part["prompt"] for part in video.segments] == ["a", "7"]  # type: ignore[attr-defined]
    assert [part["cut"] for part in video.segments] == [False, True]  # type: ignore[attr-defined]
    uneven = [{"prompt": "a", "cut": True}, {"prompt": "b"}]  # the client does not send which of the two is a cut
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt=openai.omit, extra_body={"segments": uneven})  # type: ignore[arg-type]
    assert refused.value.param == "segments[][cut]"


def test_list_pages_and_delete(client: openai.OpenAI) -> None:
    made = [client.videos.create_and_poll(prompt=str(i), poll_interval_ms=20).id for i in range(3)]
    assert [video.id for video in client.videos.list(limit=2)][:3] == made[::-1]  # goes on to the next page by itself
    assert client.videos.delete(made[0]).deleted
    with pytest.raises(openai.NotFoundError) as missing:
        client.videos.retrieve(made[0])
    assert (missing.value.code, missing.value.param) == ("not_found", "video_id")


def test_remix_and_extend(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(prompt="a", poll_interval_ms=20)
    remix = client.videos.poll(client.videos.remix(video.id, prompt="b").id, poll_interval_ms=20)
    assert (remix.status, remix.remixed_from_video_id, remix.prompt) == ("completed", video.id, "b")
    assert remix.seed == video.seed  # type: ignore[attr-defined]
    # the client's own `extend` takes files alone (3.57), against its own types
    asked = {"prompt": "c", "seconds": "4", "video": {"id": video.id}}
    longer = client.post("/videos/extensions", body=asked, cast_to=openai.types.Video)
    longer = client.videos.poll(longer.id, poll_interval_ms=20)
    assert float(longer.seconds) >= float(video.seconds) + 4
    content = client.videos.download_content(longer.id).read()
    assert len(read_video(io.BytesIO(content))) == round(float(longer.seconds) * 16)


def test_extend_with_the_clients_own_form(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(prompt="a", poll_interval_ms=20)
    # 3.57 takes a reference for a file that it cannot open, unless it comes as what goes beyond
    reference = {"video": {"id": video.id}}
    longer = client.videos.extend(prompt="b", seconds="4", video=openai.omit, extra_body=reference)  # type: ignore[arg-type]
    assert longer.extended_from_video_id == video.id  # type: ignore[attr-defined]
    assert client.videos.poll(longer.id, poll_interval_ms=20).status == "completed"
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.extend(prompt="b", seconds="4", video=("a.mp4", b"no reference"))
    assert refused.value.param == "video"


def test_a_picture_to_start_from(client: openai.OpenAI) -> None:
    grey = 40
    sent = client.videos.create_and_poll(prompt="a", input_reference=picture(grey), poll_interval_ms=20)
    assert sent.status == "completed"
    url = "data:image/png;base64," + base64.b64encode(picture(grey).getvalue()).decode()
    asked = client.post(
        "/videos", body={"prompt": "a", "input_reference": {"image_url": url}}, cast_to=openai.types.Video
    )
    named = client.videos.poll(asked.id, poll_interval_ms=20)
    first = [read_video(io.BytesIO(client.videos.download_content(v.id).read()))[0] for v in (sent, named)]
    assert np.array_equal(*first) and abs(int(first[0].mean()) - grey) < 4
    assert [len(read_video(io.BytesIO(client.videos.download_content(v.id).read()))) for v in (sent, named)] == [34, 34]


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="a", size="1280x720")
    assert (refused.value.param, refused.value.code) == ("size", "invalid_value")
    with pytest.raises(openai.BadRequestError) as bad:
        client.videos.create(prompt="a", input_reference=("picture.png", b"no picture"))
    assert bad.value.param == "input_reference"
    slow = [
        client.post("/videos", body={"prompt": "a", "num_segments": 60}, cast_to=openai.types.Video) for _ in range(2)
    ]
    with pytest.raises(openai.RateLimitError) as full:
        client.videos.create(prompt="a")
    assert full.value.code == "queue_full" and int(full.value.response.headers["retry-after"]) >= 1
    for video in slow:
        client.videos.delete(video.id)
