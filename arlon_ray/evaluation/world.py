"""The rendered world: its words, its numbers, and the exact truth of a scene.

Shared by what renders it (`data_pipeline/synthetic.py`) and by what reads it off pixels again (`scenes.py`).
Lengths are in pixels of the scene's own size, velocities in pixels a frame; x grows to the right, y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arlon_ray.config import GROUP_FRAMES

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 42, 42),
    "green": (46, 184, 66),
    "blue": (44, 84, 236),
    "yellow": (246, 214, 46),
    "purple": (190, 52, 216),
    "cyan": (48, 208, 222),
}
SHAPES = ("circle", "square", "triangle")
#: Unit vectors (x, y) in image coordinates.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
#: Pixels a frame where the shorter side is 64 pixels.
SPEEDS = {"slow": 0.6, "normal": 0.9, "fast": 1.35}
#: What an object of the simple or the rich grade does; all but `move` and `still` are of the rich one.
ACTIONS = ("move", "still", "bounce", "circle", "grow", "stop", "turn")
#: Where the first of two objects is, seen from the second.
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "above": (0, -1)}


@dataclass(frozen=True)
class Thing:
    """One object. `direction` is "still" for what never moves; `turned` is the direction after a turn."""

    shape: str
    colour: str
    diameter: float
    start: tuple[float, float]
    action: str
    direction: str
    speed: str
    turned: str | None = None


@dataclass(frozen=True)
class Shot:
    """One uncut stretch of a scene. `relation` is that of the first object to the second; `pan` is the camera's."""

    frames: int
    things: tuple[Thing, ...]
    relation: str | None
    background: str
    background_level: float
    background_phase: float
    pan: str = "still"


Track = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
#: Pixels (at 64) that an object bounces to each side, and the radius of its circles.
BOUNCE, CIRCLE = 8.0, 9.0
#: How many times its first diameter an object has in the end that grows.
GROWN = 1.7
#: The one thing that objects of the returning grade do, again and again, and how many groups each part of it takes:
#: being there, going away into the distance, being gone, coming back.
RETURN, RETURNING = "return", (1, 1, 3, 1)


def track(thing: Thing, frames: int, scale: float) -> Track:
    """Centre x, y and radius [T] of an object, in pixels; `scale` is 1 where the shorter side is 64 pixels."""
    t = np.arange(frames, dtype=np.float32)
    speed = SPEEDS[thing.speed] * scale
    way, radius = speed * t, np.full(frames, thing.diameter / 2, np.float32)
    unit_x, unit_y = DIRECTIONS[thing.direction]
    more_x, more_y = np.zeros_like(t), np.zeros_like(t)
    half = speed * frames / 2
    if thing.action == "bounce":
        reach = BOUNCE * scale
        way = reach - np.abs((way + reach) % (4 * reach) - 2 * reach)  # 0, reach, 0, -reach, 0
    elif thing.action == "circle":
        reach = CIRCLE * scale
        angle = way / reach
        way = np.zeros_like(t)
        more_x, more_y = reach * np.sin(angle), reach * (1 - np.cos(angle))
    elif thing.action == "grow":
        way = np.zeros_like(t)
        radius = (radius * (1 + (GROWN - 1) * t / max(1, frames - 1))).astype(np.float32)
    elif thing.action == RETURN:
        way, radius = np.zeros_like(t), (radius * _nearness(t)).astype(np.float32)
    elif thing.action == "stop":
        way = np.minimum(way, half)
    elif thing.action == "turn" and thing.turned is not None:
        beyond = np.maximum(way - half, 0)
        way = np.minimum(way, half)
        more_x, more_y = (beyond * np.float32(step) for step in DIRECTIONS[thing.turned])
    x = thing.start[0] + unit_x * way + more_x
    y = thing.start[1] + unit_y * way + more_y
    return x.astype(np.float32), y.astype(np.float32), radius.astype(np.float32)


def _nearness(t: NDArray[np.float32]) -> NDArray[np.float32]:
    """How large what returns looks in each frame, of its own size; below 0 where it is gone."""
    there, going, gone, coming = (groups * GROUP_FRAMES for groups in RETURNING)
    at = t % (there + going + gone + coming)
    away, back = 1 - (at - there + 1) / going, (at - there - going - gone + 1) / coming
    inside = (at >= there + going) & (at < there + going + gone)
    return np.where(inside, -1, np.where(at < there, 1, np.maximum(away, back))).astype(np.float32)


@dataclass(frozen=True)
class Deed:
    """What an object does: the part of a `Thing` that is motion. `speed` is None where a caption would name none."""

    action: str
    direction: str = "still"
    speed: str | None = None
    turned: str | None = None

    def offsets(self, frames: int) -> NDArray[np.float64]:
        """Places (x, y) [T, 2] from the first on, where the shorter side is 64 pixels."""
        x, y, _ = track(
            Thing("", "", 1.0, (0.0, 0.0), self.action, self.direction, self.speed or "normal", self.turned), frames, 1
        )
        return np.stack([x, y], -1).astype(np.float64)


def deed_of(thing: Thing) -> Deed:
    """What is to be seen of an object's motion: there and back is one bounce, whichever way it sets out."""
    if thing.action in ("move", "stop", "turn"):
        return Deed(thing.action, thing.direction, thing.speed, thing.turned)
    return Deed(thing.action, "still" if thing.action != "bounce" else _axis(thing.direction))


def deeds(actions: Sequence[str]) -> list[Deed]:
    """All that objects of a world with these actions can do."""
    ways = [name for name in DIRECTIONS if name != "still"]
    found: list[Deed] = []
    for action in actions:
        if action in ("move", "stop"):
            found += [Deed(action, way, speed) for way in ways for speed in SPEEDS]
        elif action == "turn":
            turns = [(a, b) for a in ways for b in ways if not np.dot(DIRECTIONS[a], DIRECTIONS[b])]
            found += [Deed(action, a, speed, b) for a, b in turns for speed in SPEEDS]
        elif action == "bounce":
            found += [Deed(action, way) for way in ways]
        else:
            found.append(Deed(action))
    return found


def _axis(direction: str) -> str:
    return {"left": "right", "up": "down"}.get(direction, direction)


def as_seen(deed: Deed) -> Deed:
    """A deed of `deeds` as `deed_of` names it."""
    return Deed("bounce", _axis(deed.direction)) if deed.action == "bounce" else deed
