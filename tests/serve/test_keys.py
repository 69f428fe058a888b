"""Bearer keys: made, found, revoked; and where they are needed."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from arlon_ray.config import ConfigError, ServeConfig, load_config
from serve.callers import Caller
from serve.keys import BELIEVED_S, KeyCheck, KeyNameError, Keys, Known, check_auth, open_keys
from tests.postgres import postgres
from tests.scripts import said


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(create_engine(f"sqlite:///{tmp_path / 'keys.sqlite'}"))


def test_a_key_is_found_until_it_is_revoked(keys: Keys) -> None:
    key, other = keys.add("ann"), keys.add("bob", "admin", requests_per_minute=7)
    assert keys.find(key) == Known(Caller("ann", "user"))
    assert keys.find(other) == Known(Caller("bob", "admin"), 7)
    assert keys.find(f"{other[:19]}{key[19:]}") is None  # a prefix with the secret of another
    assert keys.find(key.upper()) is None and keys.find(key + "\n") is None and keys.find("") is None
    assert keys.revoke("ann") == 1
    assert keys.find(key) is None and keys.find(other) is not None
    with pytest.raises(KeyNameError, match="ann has no key that works"):
        keys.revoke("ann")


def test_the_database_holds_no_key(keys: Keys, tmp_path: Path) -> None:
    key = keys.add("ann")
    keys.find(key)
    secret = key.split("_", 2)[2].encode()
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"ann" in stored and secret not in stored and secret[:12] not in stored
    (info,) = keys.list()
    assert key not in repr(info) and info.prefix in key
    assert len({keys.add("many", another=True) for _ in range(50)}) == 50


def test_the_last_use_is_noted_and_a_busy_database_refuses_nobody(keys: Keys, tmp_path: Path) -> None:
    key = keys.add("ann")
    assert keys.list()[0].last_used_at is None
    busy = sqlite3.connect(tmp_path / "keys.sqlite")
    busy.execute("begin immediate")
    keys._engine.dispose()
    quick = Keys(create_engine(f"sqlite:///{tmp_path / 'keys.sqlite'}", connect_args={"timeout": 0.1}))
    assert quick.find(key) == Known(Caller("ann"))
    busy.rollback()
    assert quick.find(key) == Known(Caller("ann"))
    used = keys.list()[0].last_used_at
    assert used is not None and abs(used - time.time()) < 5


def test_a_name_has_one_owner(keys: Keys) -> None:
    first = keys.add("ann")
    with pytest.raises(KeyNameError, match="ann has a key"):
        keys.add("ann")
    with pytest.raises(KeyNameError, match="ann is user"):
        keys.add("ann", "admin", another=True)
    second = keys.add("ann", another=True)
    assert keys.revoke(keys.list()[0].prefix) == 1
    assert keys.find(first) is None and keys.find(second) is not None
    for bad in ("", "a b", "-x", "x" * 65, "a\n", "å", "a;drop table keys"):
        with pytest.raises(KeyNameError, match="expected up to 64"):
            keys.add(bad)


def test_nobody_gets_a_tenant_whose_name_owns_something(keys: Keys) -> None:
    keys.add("demo")
    refused = pytest.raises(KeyNameError, match="demo is a name that is a tenant of its own")
    with refused:
        keys.add("ann", tenant="demo")
    keys.revoke("demo")  # its videos stay
    with refused:
        keys.add("ann", tenant="demo")
    assert keys.add("ann", tenant="studio")


def test_a_revoked_key_is_believed_for_seconds_only(keys: Keys) -> None:
    key, now = keys.add("ann"), [0.0]
    check = KeyCheck(keys, lambda: now[0])

    async def scenario() -> None:
        assert await check("arlon_wrong") is None
        assert await check(key) == Known(Caller("ann"))
        keys.revoke("ann")
        now[0] = BELIEVED_S - 0.1
        assert await check(key) is not None
        now[0] = BELIEVED_S + 0.1
        assert await check(key) is None
        new = keys.add("ann")
        assert await check(new) is not None  # what was unknown is not believed to stay so

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("auth", "host", "needed"),
    [
        ("auto", "127.0.0.1", False),
        ("auto", "::1", False),
        ("auto", "localhost", False),
        ("auto", "127.8.9.1", False),
        ("auto", "0.0.0.0", True),
        ("auto", "::", True),
        ("auto", "", True),
        ("auto", "192.0.2.1", True),
        ("auto", "localhost.evil.test", True),
        ("on", "127.0.0.1", True),
        ("off", "127.0.0.1", False),
        ("off", "0.0.0.0", None),
        ("off", "box", None),
    ],
)
def test_keys_are_needed_where_others_can_reach_the_service(auth: str, host: str, needed: bool | None) -> None:
    settings = ServeConfig.model_validate({"auth": auth, "host": host})
    if needed is not None:
        assert check_auth(settings) is needed
        return
    with pytest.raises(ConfigError, match=r"serve\.auth=off, but serve\.host=.*jobs/keys\.py add NAME"):
        check_auth(settings)


def test_on_and_off_can_be_written_without_quotes() -> None:
    found = [load_config("tiny", [f"serve.auth={value}"]).serve.auth for value in ("on", "off", "auto")]
    assert found == ["on", "off", "auto"]


def test_a_service_without_any_key_says_how_to_make_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, settings = create_engine(f"sqlite:///{tmp_path / 'k'}"), ServeConfig(auth="on")
    assert open_keys(settings, engine) is not None
    assert f"python jobs/keys.py add NAME --database 'sqlite:///{tmp_path}/k'" in caplog.text
    caplog.clear()
    Keys(engine).add("ann")
    assert open_keys(settings, engine) is not None and caplog.text == ""
    assert open_keys(ServeConfig(), engine) is None


def test_command_line(tmp_path: Path) -> None:
    call = partial(said, "keys")

    here = ("--data", str(tmp_path / "service"))
    assert "not found" in call("list", *here, code=2)
    key = call("add", "ann", "--role", "admin", "--requests-per-minute", "9", *here).split()[0]
    call("add", "bob", *here)
    shown = call("list", *here)
    assert key not in shown and "ann   admin" in shown and "9" in shown
    assert "bob has a key: revoke it first" in call("add", "bob", *here, code=2)
    assert "expected up to 64" in call("add", "a b", *here, code=2)
    assert "expected 1 or more" in call("add", "c", "--requests-per-minute", "0", *here, code=2)
    call("revoke", "ann", *here)
    assert "revoked" in call("list", *here)
    assert "no key that works" in call("revoke", "ann", *here, code=2)
    wrong = call("list", "--database", "postgresql+psycopg2://user:hunter2@127.0.0.1:1/x", code=2)
    assert "cannot be opened" in wrong and "hunter2" not in wrong
    (tmp_path / "file").write_text("")
    assert "cannot be opened" in call("add", "x", "--data", str(tmp_path / "file"), code=2)


def test_keys_in_postgresql(tmp_path: Path) -> None:
    with postgres(tmp_path) as uri:
        engine = create_engine(uri)
        keys = Keys(engine)
        key = keys.add("ann", "admin", 5)
        assert keys.find(key) == Known(Caller("ann", "admin"), 5)
        assert keys.find("arlon_\0") is None
        assert keys.revoke("ann") == 1 and keys.find(key) is None and not keys.any()
        engine.dispose()
