"""Captions of rendered scenes, in natural and varied wording: synonyms × templates, at most 20 words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_WORDS = 20

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
}
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
    return f"{_pick(random, before)} {phrase}" if random.random() < 0.5 else f"{phrase} {_pick(random, after)}"


def compose(
    random: np.random.Generator, *, count: int, colour: str, shape: str, direction: str, speed: str, background: str
) -> str:
    """One caption of at most `MAX_WORDS` words. The background is named in about half of them."""
    subject = f"a {colour} {shape}" if count == 1 else f"two {colour} {shape}s"
    template = str(_pick(random, _TEMPLATES))
    form = 2 if "{g}" in template else min(count, 2) - 1
    motion = " ".join(_motion(random, direction, speed, form).split())
    place = f" {_pick(random, _PLACE[background])}" if random.random() < 0.5 else ""
    for where in (place, ""):
        text = template.format(s=subject, v=motion, g=motion, be="is" if count == 1 else "are", p=where)
        if len(text.split()) <= MAX_WORDS:
            break
    return text[0].upper() + text[1:]
