"""Serve a model bundle over HTTP: text in, long video out. `python jobs/serve_bundle.py --bundle DIR`."""

from __future__ import annotations

import argparse
import signal
import socket
import threading

from arlon_ray.bundle import load_bundle
from arlon_ray.mirror import is_remote
from jobs import command_line
from jobs.holding import BusyError
from jobs.ray_session import connect
from serve.app import check_devices, serve_bundle
from serve.owner import OwnerError
from serve.settings import config_of

EXAMPLE = """\
serving {bundle} at {url}

  curl -s {url}/v1/videos -H 'Content-Type: application/json' \\
    -d '{{"segments": [{{"prompt": "A red circle moves to the right."}}, {{"prompt": "A red circle moves down."}}], \
"num_segments": 4}}'
  curl -s {url}/v1/videos/ID
  curl -s {url}/v1/videos/ID/content -o video.mp4

API description: {url}/docs    videos: {data}    Ctrl-C ends"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of every job, and --bundle, --host, --port."""
    parser = command_line.parser(__doc__ or "", output="runs/serve")
    parser.set_defaults(config=None)
    parser.add_argument(
        "--bundle", default=str(command_line.BOX), metavar="DIR",
        help="model bundle, whose configuration is the default (default: weights/tiny)",
    )  # fmt: skip
    parser.add_argument("--host", metavar="ADDRESS", help="same as --set serve.host=ADDRESS")
    parser.add_argument("--port", metavar="NUMBER", help="same as --set serve.port=NUMBER")
    result = parser.parse_args(arguments)
    for name in ("host", "port"):
        if (value := getattr(result, name)) is not None:
            result.overrides.append(f"serve.{name}={value}")
    return result


def check_port(host: str, port: int) -> None:
    """Raises InputError if nothing can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            # as the server itself does: connections of an earlier one that are fading away are no obstacle
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise command_line.InputError(f"--host {host} --port {port}: cannot listen: {error.strerror}") from None


def main() -> None:
    """Check everything, start Ray and Serve, and wait for the end."""
    arguments = parse()
    path = command_line.existing(arguments.bundle, "--bundle")
    bundle = load_bundle(path)
    config = config_of(bundle, arguments.config, arguments.overrides)
    if not bundle.guided:
        print("this bundle is text-only: it is served without an AR", flush=True)
    check_devices(config)
    check_port(config.serve.host, config.serve.port)
    if is_remote(arguments.output):
        raise command_line.InputError(
            f"--output {arguments.output}: the service keeps a database there: name a folder, or set serve.data_dir to "
            "the bucket and serve.database_url to a database"
        )
    data = command_line.output_folder(arguments)
    # a wrong text encoder would otherwise show as replicas that never start
    bundle.check_text()
    print("starting Ray Serve …", flush=True)
    try:
        with connect(config), serve_bundle(config, bundle, data) as url:
            ended = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: ended.set())
            print(EXAMPLE.format(bundle=path, url=url, data=config.serve.data_dir or data), flush=True)
            ended.wait()
            print("stopping: unfinished videos go on when it is started again with the same --output …", flush=True)
    except OwnerError as error:
        raise BusyError(str(error)) from None


if __name__ == "__main__":
    command_line.run(main)
