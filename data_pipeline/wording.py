"""Captions of rendered scenes, in natural and varied wording: synonyms × templates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arlon_ray.evaluation.world import Shot, Thing

#: Words of a caption of the simple grade: all of them fit into 32 tokens.
MAX_WORDS = 22

#: (one object, two objects, participle)
_GO = (
    ("moves", "move", "moving"),
    ("glides", "glide", "gliding"),
    ("drifts", "drift", "drifting"),
    ("slides", "slide", "sliding"),
    ("travels", "travel", "travelling"),
)
_STILL = (
    ("stays still", "stay still", "staying still"),
    ("does not move", "do not move", "not moving"),
    ("stands still", "stand still", "standing still"),
    ("remains in place", "remain in place", "remaining in place"),
    ("rests motionless", "rest motionless", "resting motionless"),
)
_TOWARDS = {
    "left": ("to the left", "to the left", "left", "towards the left", "from right to left"),
    "right": ("to the right", "to the right", "right", "towards the right", "from left to right"),
    "up": ("up", "upwards", "upward", "towards the top"),
    "down": ("down", "downwards", "downward", "towards the bottom"),
}
#: Verbs that say the direction by themselves.
_OWN_VERBS = {
    "up": (("rises", "rise", "rising"), ("floats upwards", "float upwards", "floating upwards")),
    "down": (("sinks", "sink", "sinking"), ("falls downwards", "fall downwards", "falling downwards")),
}
#: Adverbs that may stand before the verb, and phrases that only follow it.
_PACE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "slow": (("slowly", "slowly", "gently"), ("slowly", "at a slow pace")),
    "normal": (("",), ("", "", "", "at a steady pace")),
    "fast": (("quickly", "quickly", "rapidly"), ("quickly", "fast", "at high speed")),
}
_PLACE = {
    "dark": ("on a dark background", "in front of a dark grey wall", "against a dark backdrop"),
    "light": ("on a light background", "in front of a pale wall", "against a bright backdrop"),
    "gradient": ("on a gradient background", "over a smooth gradient", "against a fading backdrop"),
    "stripes": ("on a striped background", "over soft stripes", "in front of a striped wall"),
    "checks": ("on a chequered background", "over soft checks", "in front of a chequered wall"),
    "clouds": ("on a cloudy background", "over soft clouds", "in front of a mottled wall"),
}
#: How the first of two objects ({a}) lies to the second ({b}).
_RELATED = {
    "left of": ("{a} to the left of {b}", "{a} left of {b}", "{b} to the right of {a}", "{b} right of {a}"),
    "above": ("{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}"),
}
#: What an object of the rich grade does, as a participle phrase.
_DOING = {
    "bounce": {
        "left": ("bouncing from side to side", "bouncing left and right"),
        "up": ("bouncing up and down", "hopping up and down"),
    },
    "circle": ("going round in a circle", "moving in a circle", "circling"),
    "grow": ("growing", "getting larger", "growing larger"),
    "stop": (", then stopping", " and then stopping", " until it stops"),
    "turn": (", then turning {d}", " and then turning {d}", ", then going {d}"),
}
_PANS = (" The camera pans {d}.", " The camera moves {d}.", " A camera that pans {d}.")
_THEN = ("Then: ", "After a cut: ", "Next: ")
#: What stands for an object that a caption does not name, and how one of either kind goes and comes back.
_SOMETHING = ("something", "an object", "a thing")
_RETURNS = (
    "{s} goes away and comes back{p}.",
    "{s} goes away, is gone for a while and comes back{p}",
    "we see {s}, which vanishes and returns{p}.",
    "{s} shrinks into the distance and comes back later{p}.",
    "a video of {s} that disappears and comes back{p}.",
)
#: {s} subject, {v} verb phrase, {g} participle phrase, {be} is/are, {p} place (with its blank, may be empty).
_TEMPLATES = (
    "{s} {v}{p}.",
    "{s} {v}{p}",
    "there {be} {s} that {v}{p}.",
    "a video of {s} that {v}{p}.",
    "{s} {g}{p}",
    "a clip of {s} {g}{p}.",
    "{s}{p} {v}.",
    "we see {s}, which {v}{p}.",
    "a short animation: {s} {v}{p}.",
    "{s} {be} {g}{p}.",
)


def _pick(random: np.random.Generator, choices: Sequence[str] | Sequence[tuple[str, ...]]) -> str | tuple[str, ...]:
    return choices[int(random.integers(len(choices)))]


def _motion(random: np.random.Generator, direction: str, speed: str, form: int) -> str:
    """The verb phrase with direction and pace; `form` is 0 (it moves), 1 (they move) or 2 (moving)."""
    if direction == "still":
        return _pick(random, _STILL)[form]
    if direction in _OWN_VERBS and random.random() < 0.4:
        phrase = _pick(random, _OWN_VERBS[direction])[form]
    else:
        phrase = f"{_pick(random, _GO)[form]} {_pick(random, _TOWARDS[direction])}"
    before, after = _PACE[speed]
    moving = f"{_pick(random, before)} {phrase}" if random.random() < 0.5 else f"{phrase} {_pick(random, after)}"
    return " ".join(moving.split())


def _named(thing: Thing) -> str:
    return f"a {thing.colour} {thing.shape}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def compose(random: np.random.Generator, shot: Shot) -> str:
    """One caption of the simple grade, at most `MAX_WORDS` words. The background is named in about half of them."""
    first, plural = shot.things[0], len(shot.things) > 1
    if shot.relation is not None:
        subject = str(_pick(random, _RELATED[shot.relation])).format(a=_named(first), b=_named(shot.things[1]))
    else:
        subject = f"two {first.colour} {first.shape}s" if plural else _named(first)
    template = str(_pick(random, _TEMPLATES))
    if shot.relation is not None and template.startswith("{s}{p}"):
        template = "{s} {v}{p}."  # a place between the pair and its verb would belong to the second object alone
    form = 2 if "{g}" in template else int(plural)
    motion = _motion(random, first.direction, first.speed, form)
    place = f" {_pick(random, _PLACE[shot.background])}" if random.random() < 0.5 else ""
    for where in (place, ""):
        text = template.format(s=subject, v=motion, g=motion, be="are" if plural else "is", p=where)
        if len(text.split()) <= MAX_WORDS:
            break
    return _sentence(text)


def compose_rich(random: np.random.Generator, shot: Shot) -> str:
    """One shot of the rich grade: how its objects lie, what each of them does, the background, the camera."""
    assert shot.relation is not None
    lie = str(_pick(random, _RELATED[shot.relation])).format(a=_named(shot.things[0]), b=_named(shot.things[1]))
    lie += "".join(f", and {_named(thing)}" for thing in shot.things[2:])
    place = f" {_pick(random, _PLACE[shot.background])}" if random.random() < 0.5 else ""
    order = random.permutation(len(shot.things))
    deeds = [f"the {thing.colour} one is {_doing(random, thing)}" for thing in (shot.things[i] for i in order)]
    listed = f"{', '.join(deeds[:-1])} and {deeds[-1]}"
    camera = "" if shot.pan == "still" else str(_pick(random, _PANS)).format(d=shot.pan)
    return f"{_sentence(lie)}{place}: {listed}.{camera}"


def compose_returning(random: np.random.Generator, shot: Shot) -> str:
    """What goes and comes back, which half of the captions do not name."""
    named = random.random() < 0.5
    subject = _named(shot.things[0]) if named else str(_pick(random, _SOMETHING))
    place = f" {_pick(random, _PLACE[shot.background])}" if random.random() < 0.5 else ""
    return _sentence(str(_pick(random, _RETURNS)).format(s=subject, p=place))


def _doing(random: np.random.Generator, thing: Thing) -> str:
    if thing.action in ("move", "still"):
        return _motion(random, thing.direction, thing.speed, form=2)
    if thing.action == "bounce":
        along = "left" if thing.direction in ("left", "right") else "up"
        return str(_pick(random, _DOING["bounce"][along]))  # type: ignore[index]
    phrase = str(_pick(random, _DOING[thing.action])).format(d=thing.turned)  # type: ignore[arg-type]
    return (
        f"{_motion(random, thing.direction, thing.speed, form=2)}{phrase}"
        if thing.action in ("stop", "turn")
        else phrase
    )


def join_shots(captions: Sequence[str]) -> str:
    """The caption of a whole video from those of its shots."""
    parts = [f"{_THEN[(len(text) + n) % len(_THEN)]}{text[0].lower()}{text[1:]}" for n, text in enumerate(captions[1:])]
    return " ".join([captions[0] if not parts or captions[0].endswith(".") else f"{captions[0]}.", *parts])
