"""`/docs`: the API's description in a real Chromium, which finds nothing but this server; and what it says of keys."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.testclient import TestClient

from serve.api import build_api
from serve.blobs import Blobs
from serve.job_store import JobStore
from serve.keys import KeyCheck, Keys
from serve.page import SWAGGER_UI
from serve.service import VideoService
from tests.serve.browser import Visiting
from tests.serve.stages import FakeStages, small_config
from tests.serve.test_guard import keys_in


def api(folder: Path, keys: Keys | None = None) -> FastAPI:
    config = small_config()
    service = VideoService(config, JobStore.in_folder(folder), FakeStages(config), Blobs(folder))
    return build_api(service, config, keys and KeyCheck(keys))


def asking(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))


def test_the_api_is_read_and_tried_with_a_key_and_without_internet(visit: Visiting, tmp_path: Path) -> None:
    keys = keys_in(tmp_path)
    key = keys.add("ann")
    seen, _ = visit(keys=keys)  # at its end: no other host was asked, and nothing was refused by the policy
    seen.may_fail.append("status of 401")
    seen.one("#ask-key").fill(key)
    seen.page.keyboard.press("Enter")
    seen.expect(seen.one("#server")).to_have_text("model tiny")
    assert seen.page.evaluate("sessionStorage.length") > 0
    seen.follow("API")
    assert seen.page.evaluate("sessionStorage.length") == 0  # Swagger UI's script finds no key there
    seen.expect(seen.one(".opblock")).to_have_count(len(list(operations(api(tmp_path).openapi()))))
    seen.shot("api")
    models = seen.one("#operations-service-models_v1_models_get")
    models.locator(".opblock-summary-control").click()
    models.get_by_role("button", name="Try it out").click()
    models.get_by_role("button", name="Execute").click()
    answer = models.locator(".live-responses-table td.response-col_status:not(.col_header)")
    seen.expect(answer).to_contain_text("401")  # it was told nothing of the key that the tab has
    seen.one(".scheme-container .authorize").click()
    seen.one(".modal-ux input").fill(key)
    seen.one(".modal-ux .authorize").click()
    seen.one(".modal-ux .btn-done").click()
    models.get_by_role("button", name="Execute").click()
    seen.expect(answer).to_contain_text("200")
    seen.shot("api-tried")


def operations(described: dict) -> list[tuple[str, dict]]:
    """Path and description of each."""
    return [(path, each) for path, methods in described["paths"].items() for each in methods.values()]


def test_the_description_says_which_routes_take_a_key(tmp_path: Path) -> None:
    described = api(tmp_path, keys_in(tmp_path)).openapi()
    assert described["security"] == [{"key": []}]
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert {path for path, each in operations(described) if each.get("security") == []} == {"/healthz"}
    assert all("security" not in each for path, each in operations(described) if path != "/healthz")
    # where none is needed, clients that are made of the description can send one nevertheless
    assert api(tmp_path).openapi()["security"] == [{}, {"key": []}]


def test_everybody_may_read_it_and_no_other_page_of_it_is_there(tmp_path: Path) -> None:
    client = asking(api(tmp_path, keys_in(tmp_path)))
    page = client.get("/docs").text
    assert page.count("<script") == 2 and '="/' not in page  # found behind a proxy's prefix too
    for name in SWAGGER_UI:
        assert len(client.get(f"/docs/{name}").content) > 100_000
    for path in ("/docs", *(f"/docs/{name}" for name in SWAGGER_UI)):
        assert "script-src 'self';" in client.get(path).headers["content-security-policy"]
        assert int(client.get(path).headers["content-length"]) < 500_000
    for path in ("/docs/", "/docs/oauth2-redirect", "/docs/redoc.standalone.js", "/docs/..%2Fcore.py"):
        assert client.get(path).status_code == 404, path
    for app in (api(tmp_path), api(tmp_path, keys_in(tmp_path))):
        assert asking(app).get("/redoc").status_code in (401, 404)
