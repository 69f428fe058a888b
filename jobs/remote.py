"""The commands of `arlon` that a server carries out."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jobs.watching import bad_input, check_output, download, go_on
from serve.client import Client

#: How a video is rendered: flag, field of the request, type, what it is.
SETTINGS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("--steps", "num_inference_steps", int, "denoising steps"),
    ("--solver", "solver", str, "how a step is taken: euler, midpoint, heun, ab2 or dpm2m"),
    ("--guidance-scale", "guidance_scale", float, "how strongly the text guides the pictures"),
    ("--token-guidance-scale", "token_guidance_scale", float, "how strongly the plan's tokens guide them"),
)


class Command(NamedTuple):
    """One word after `arlon`."""

    about: str
    flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Client, argparse.Namespace], None]


def _settings(flags: argparse.ArgumentParser) -> None:
    for flag, field, kind, about in SETTINGS:
        flags.add_argument(flag, dest=field, type=kind, help=about)


def _waiting(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--wait", action="store_true", help="show the progress, and end when it is finished")
    flags.add_argument("--output", metavar="FILE", help="wait, then write the mp4 there")


def _ids(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("id", metavar="ID", help="video_… or draft_…")


def _submit_flags(flags: argparse.ArgumentParser) -> None:
    from jobs.storyboards import add_flags

    add_flags(flags)
    flags.add_argument("--seed", type=int, help="the same seed, the same video (default: the server draws one)")
    _settings(flags)
    flags.add_argument("--negative-prompt", help="what must not be seen")
    flags.add_argument("--baseline", action="store_true", help="the text-only DiT, without the AR's tokens")
    flags.add_argument("--image", metavar="FILE", help="the first frame: image to video")
    flags.add_argument("--draft", action="store_true", help="plan it and show a preview, without rendering it")
    _waiting(flags)


def _submit(client: Client, arguments: argparse.Namespace) -> None:
    # here: it brings torch, which the other commands do without
    from jobs.command_line import InputError, existing
    from jobs.storyboards import read_scenes

    try:
        scenes = read_scenes(arguments)
        image = existing(arguments.image, "--image") if arguments.image else None
    except InputError as error:
        raise bad_input(str(error)) from None
    body: dict[str, Any] = {}
    if len(scenes) == 1 and scenes[0].seconds is None:
        body["prompt"] = scenes[0].prompt
    else:
        parts = [{"prompt": scene.prompt, "seconds": scene.seconds, "cut": scene.cut or None} for scene in scenes]
        body["segments"] = [{name: value for name, value in part.items() if value is not None} for part in parts]
    if arguments.seconds and all(scene.seconds is None for scene in scenes):
        body["seconds"] = arguments.seconds[0]
    fields = {"num_segments": arguments.segments, "seed": arguments.seed, "negative_prompt": arguments.negative_prompt}
    fields |= {"transition_latents": arguments.transition or None, "baseline": arguments.baseline or None}
    rendering = {field: getattr(arguments, field) for _, field, _, _ in SETTINGS}
    if arguments.draft:
        _refuse_rendering(arguments, rendering)
    body |= {name: value for name, value in (fields | rendering).items() if value is not None}
    check_output(arguments.output)
    try:
        made = client.create(body, image=image, draft=arguments.draft)
    except OSError as error:
        raise bad_input(f"--image {image}: cannot be read: {error.strerror}") from None
    go_on(client, made, arguments)


def _refuse_rendering(arguments: argparse.Namespace, rendering: dict[str, Any]) -> None:
    for flag, field, _, _ in SETTINGS:
        if rendering[field] is not None:
            raise bad_input(f"{flag}: a draft is not rendered; give it to `arlon render`")
    if arguments.baseline:
        raise bad_input("--baseline: has no plan, so there is no draft of it")


def _watch_flags(flags: argparse.ArgumentParser) -> None:
    _ids(flags)
    flags.add_argument("--output", metavar="FILE", help="write the mp4 there when it is finished")


def _watch(client: Client, arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    arguments.wait = True
    go_on(client, client.get(arguments.id), arguments)


def _list_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--drafts", action="store_true", help="drafts instead of videos")
    flags.add_argument("--limit", type=int, default=20, metavar="N", help="how many, newest first (default: 20)")
    flags.add_argument("--json", action="store_true", help="all that is known of each, one a line")


def _list(client: Client, arguments: argparse.Namespace) -> None:
    for made in client.list("drafts" if arguments.drafts else "videos", limit=arguments.limit):
        if arguments.json:
            print(json.dumps(made))
            continue
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(made["created_at"]))
        state = f"{made['status']:<11} {made['progress']:>3} %  {float(made['seconds']):>7.4g} s"
        print(f"{made['id']}  {state}  {when}  {' / '.join(made['prompt'].split(chr(10)))}")


def _get_flags(flags: argparse.ArgumentParser) -> None:
    _ids(flags)
    flags.add_argument("--output", metavar="FILE", help="write the file there (default: print what is known of it)")
    flags.add_argument("--variant", choices=("video", "thumbnail", "spritesheet"), default="video", help="which file")


def _get(client: Client, arguments: argparse.Namespace) -> None:
    if not arguments.output:
        print(json.dumps(client.get(arguments.id), indent=2))
        return
    check_output(arguments.output)
    download(client, arguments.id, arguments.output, arguments.variant)
    print(Path(arguments.output).expanduser().absolute())


def _delete_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("ids", metavar="ID", nargs="+", help="video_… or draft_…; what is being made is stopped")


def _delete(client: Client, arguments: argparse.Namespace) -> None:
    for made_id in arguments.ids:
        client.delete(made_id)
        print(f"{made_id}: deleted")


def _draft_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("action", choices=("reroll",), help="plan one segment anew")
    flags.add_argument("id", metavar="DRAFT")
    flags.add_argument("segment", metavar="K", type=int, help="the segment (the first is 0)")
    flags.add_argument("--seed", type=int, help="default: the server draws one")
    flags.add_argument("--prompt", help="what the segment is about from now on")
    flags.add_argument("--replan", action="store_true", help="plan the segments behind it anew too")
    _waiting(flags)


def _draft(client: Client, arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    given = {"seed": arguments.seed, "prompt": arguments.prompt, "replan": arguments.replan}
    made = client.reroll(arguments.id, arguments.segment, **given)
    go_on(client, made, arguments)


def _render_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("id", metavar="DRAFT")
    _settings(flags)
    _waiting(flags)


def _render(client: Client, arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    given = {field: getattr(arguments, field) for _, field, _, _ in SETTINGS}
    go_on(client, client.render(arguments.id, {k: v for k, v in given.items() if v is not None}), arguments)


def _remix_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("id", metavar="VIDEO")
    flags.add_argument("--prompt", required=True, help="the other text")
    _waiting(flags)


def _remix(client: Client, arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    go_on(client, client.remix(arguments.id, arguments.prompt), arguments)


def _extend_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("id", metavar="VIDEO")
    flags.add_argument("--prompt", required=True, help="how it goes on")
    flags.add_argument("--seconds", type=float, metavar="S", help="for how long (default: a segment)")
    flags.add_argument("--cut", action="store_true", help="it begins a new shot, instead of going on from what is seen")
    _waiting(flags)


def _extend(client: Client, arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    made = client.extend(arguments.id, arguments.prompt, arguments.seconds, cut=arguments.cut)
    go_on(client, made, arguments)


COMMANDS = {
    "submit": Command("have the server make a video, or a draft", _submit_flags, _submit),
    "watch": Command("show the progress of one until it is finished", _watch_flags, _watch),
    "list": Command("what the server has", _list_flags, _list),
    "get": Command("download one, or print what is known of it", _get_flags, _get),
    "delete": Command("delete or stop", _delete_flags, _delete),
    "draft": Command("plan a segment of a draft anew: `arlon draft reroll DRAFT K`", _draft_flags, _draft),
    "render": Command("render a draft", _render_flags, _render),
    "remix": Command("a video again with another text", _remix_flags, _remix),
    "extend": Command("a video that goes on from the end of another", _extend_flags, _extend),
}
