"""Who may use the service where keys are off: this machine, and no page of another site that its browser shows."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from arlon_ray.config import ServeConfig
from serve.keys import is_loopback
from serve.schema import RequestError


def check_local(scope: Scope, headers: Headers, settings: ServeConfig) -> None:
    """Raises RequestError (403) for a request that does not come from here.

    That is another machine (the server listens elsewhere than serve.host says), a name that somebody else made point
    here, or a page of another site that has a browser on this machine send something.
    """
    client = scope.get("client")
    if client and _is_elsewhere(client[0]):
        raise _refused(
            "this service has no keys and answers its own machine alone: set serve.auth=on, and make a key with "
            "`python jobs/keys.py add NAME`",
            "keys_are_off",
        )
    host = headers.get("host", "")
    name = _name(host)
    if name and not is_loopback(name) and name not in {settings.host, *settings.allowed_hosts}:
        raise _refused(f"the service is not known as {name[:64]!r}: see serve.allowed_hosts", "unknown_host")
    origin = headers.get("origin")
    if origin is not None and scope["method"] not in ("GET", "HEAD", "OPTIONS") and urlsplit(origin).netloc != host:
        raise _refused("pages of other sites may not use this service", "foreign_page")


def _is_elsewhere(client: str) -> bool:
    try:
        address = ipaddress.ip_address(client)
    except ValueError:  # a local socket has no address
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return not (mapped or address).is_loopback


def _name(host: str) -> str:
    """The host in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # half an IPv6 address, for one
        return f"{host}?"


def _refused(message: str, code: str) -> RequestError:
    return RequestError(message, code=code, status=403)
