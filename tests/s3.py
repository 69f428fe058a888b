"""A real S3 server for tests, in a thread of this process, and a client of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def s3_server(*buckets: str, host: str = "127.0.0.1") -> Iterator[str]:
    """A server with these buckets: yields the part of a URI that names it; keys are in the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=host, port=0)
    server.start()
    before = dict(os.environ)
    os.environ.update(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_EC2_METADATA_DISABLED="true")
    options = "?endpoint_override={}:{}&scheme=http&region=us-east-1".format(*server.get_host_and_port())
    try:
        for bucket in buckets:
            client_with(options).create_bucket(Bucket=bucket)
        yield options
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)


def endpoint(options: str) -> str:
    """The server's URL."""
    return f"http://{dict(part.split('=') for part in options[1:].split('&'))['endpoint_override']}"


def client_with(options: str) -> Any:
    """boto3's client of the server."""
    import boto3

    return boto3.client("s3", endpoint_url=endpoint(options), region_name="us-east-1")
