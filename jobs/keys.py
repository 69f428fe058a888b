"""Keys of the service: `python jobs/keys.py add NAME --data DIR`, `list`, `revoke NAME`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from arlon_ray.artifact import one_line
from jobs import command_line
from jobs.command_line import InputError, aligned
from serve.job_store import JobStore
from serve.keys import KeyInfo, KeyNameError, Keys


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """add, list or revoke, and where the service keeps its jobs."""
    place = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    place.add_argument(
        "--data", metavar="DIR", default="runs/serve",
        help="folder of the service (its --output, or serve.data_dir; default: runs/serve)",
    )  # fmt: skip
    place.add_argument("--database", metavar="URL", help="its serve.database_url, where that is set, instead of --data")
    parser = argparse.ArgumentParser(description="Keys of the service.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="add|list|revoke")
    add = commands.add_parser("add", parents=[place], help="make a key; it is shown once", allow_abbrev=False)
    add.add_argument("name", metavar="NAME", help="whose it is: what is made with it belongs to NAME")
    add.add_argument("--role", choices=("user", "admin"), default="user", help="an admin sees everybody's videos")
    add.add_argument("--tenant", default="", metavar="TENANT", help="whose videos it shares (default: NAME's own)")
    add.add_argument("--requests-per-minute", type=int, metavar="N", help="instead of serve.requests_per_minute")
    add.add_argument("--another", action="store_true", help="beside the key that NAME has already")
    commands.add_parser("list", parents=[place], help="all keys, without their secrets", allow_abbrev=False)
    revoke = commands.add_parser("revoke", parents=[place], help="from then on they are refused", allow_abbrev=False)
    revoke.add_argument("name", metavar="NAME|PREFIX", help="all keys of NAME, or the one with that PREFIX")
    return parser.parse_args(arguments)


@contextmanager
def open_keys(arguments: argparse.Namespace) -> Iterator[Keys]:
    """The keys where the flags say. Raises InputError."""
    folder = Path(arguments.data).expanduser().absolute()
    if arguments.database is None and arguments.command != "add" and not folder.is_dir():
        raise InputError(f"--data {folder}: not found")
    try:
        store = JobStore.opened(arguments.database, folder)
    except (SQLAlchemyError, OSError, ImportError) as error:
        # the address may hold a password: it is not repeated
        where = "--database" if arguments.database else f"--data {folder}"
        raise InputError(f"{where}: cannot be opened: {type(error).__name__}") from None
    try:
        yield Keys(store.engine)
    except KeyNameError as error:
        raise InputError(one_line(error)) from None
    finally:
        store.close()


def table(keys: list[KeyInfo]) -> str:
    """One line a key."""
    rows = [("NAME", "ROLE", "PREFIX", "CREATED", "LAST USED", "STATE", "PER MINUTE", "TENANT")]
    for key in keys:
        state = "works" if key.revoked_at is None else f"revoked {_day(key.revoked_at)}"
        limit, tenant = str(key.requests_per_minute or "default"), key.tenant or key.name
        created, used = _day(key.created_at), _day(key.last_used_at)
        rows.append((key.name, key.role, key.prefix, created, used, state, limit, tenant))
    return aligned(rows)


def main() -> None:
    """Command line."""
    arguments = parse()
    if arguments.command == "add" and arguments.requests_per_minute is not None and arguments.requests_per_minute < 1:
        raise InputError(f"--requests-per-minute {arguments.requests_per_minute}: expected 1 or more")
    with open_keys(arguments) as keys:
        if arguments.command == "add":
            name, role, tenant = arguments.name, arguments.role, arguments.tenant
            key = keys.add(name, role, arguments.requests_per_minute, tenant=tenant, another=arguments.another)
            whose = f"{name} ({role}{f', of {tenant}' if tenant else ''})"
            print(f"{key}\n\nThis is the key of {whose}. It is shown this once: keep it now.")
        elif arguments.command == "revoke":
            count = keys.revoke(arguments.name)
            print(f"revoked {count} key{'s' if count > 1 else ''}; a running service refuses them within seconds")
        else:
            print(table(keys.list()))


def _day(moment: int | None) -> str:
    return "never" if moment is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


if __name__ == "__main__":
    command_line.run(main)
