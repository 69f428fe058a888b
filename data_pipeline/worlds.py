"""The grades of the rendered world: what scenes there are, drawn by seed.

`simple`: one object of 22–30 pixels (at 64), or two smaller ones that move together: equal ones, or two of different
colours one beside or above the other. Few clear motions: learnable by the tiny preset.
`rich`: two or three objects of different colours, each with an action of its own (bounce, circle, grow, stop, turn and
the simple ones), relations, textured backgrounds, camera pans; one video in four has a cut to a second shot.
`returning`: one object that goes away, is gone for three groups, and comes back as it was. Half of the captions do not
say what it is: a model has to remember it.
`changing`: from some latent frame on there is something else to be seen, and another caption: the objects of a simple
scene go another way, or there is a cut to another scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, get_args

import numpy as np

from arlon_ray.config import GROUP_FRAMES, Config, ConfigError
from arlon_ray.evaluation.world import (
    ACTIONS,
    COLOURS,
    DIRECTIONS,
    RELATIONS,
    RETURN,
    SHAPES,
    SPEEDS,
    Shot,
    Thing,
    track,
)
from data_pipeline.wording import compose, compose_returning, compose_rich, join_shots

Random = np.random.Generator
SIMPLE_BACKGROUNDS = ("dark", "light", "gradient", "stripes")
TEXTURES = ("stripes", "checks", "clouds")
OPPOSITE = {name: next(n for n, way in DIRECTIONS.items() if way == (-x, -y)) for name, (x, y) in DIRECTIONS.items()}
#: Diameters (pixels, at 64) of one object, and of one of several.
ONE, SEVERAL = (22.0, 30.0), (16.0, 20.0)
#: Shares of the simple grade: two equal objects, and two different ones.
EQUAL_PAIRS, DIFFERENT_PAIRS = 0.12, 0.36
#: Distance of two related objects (pixels, at 64): apart, and less than half way round the torus.
APART, ASIDE = (24.0, 28.0), 4.0
#: Shares of the rich grade.
THREE, PANS, CUTS = 0.35, 0.25, 0.25
#: Shares of the changing grade: objects that turn, and how many of these turn back.
TURNS, REVERSALS = 0.6, 0.6
#: What scenes are held out for, each from a range of seeds of its own.
HeldOut = Literal["measure", "tune", "gate", "benchmark"]
HELD_OUT: tuple[HeldOut, ...] = get_args(HeldOut)
#: Seeds of scenes that are rendered for training stay below.
BEYOND = 2**52


@dataclass(frozen=True)
class Scene:
    """The exact ground truth of one rendered video."""

    seed: int
    grade: str
    height: int
    width: int
    shots: tuple[Shot, ...]

    @property
    def frames(self) -> int:
        """Length of the video."""
        return sum(shot.frames for shot in self.shots)


def sample_scene(
    seed: int, groups: Sequence[int] = (2, 3, 4), height: int = 64, width: int = 64, grade: str = "simple"
) -> Scene:
    """Draw a scene: equal arguments, equal scene. Its length is one of `groups` × 17 frames.

    Raises ValueError for an unknown grade.
    """
    if grade not in GRADES:
        raise ValueError(f"grade {grade!r}: expected one of {', '.join(GRADES)}")
    random = np.random.default_rng([seed, 0, list(GRADES).index(grade)])
    frames = int(random.choice(list(groups))) * GROUP_FRAMES
    draw, _ = GRADES[grade]
    return Scene(seed, grade, height, width, draw(random, frames, height, width))


def training_seed(seed: int, index: int) -> int:
    """Of sample `index` of a set. Raises ValueError if the set would reach what is held out."""
    if (found := seed * 1_000_003 + index) >= BEYOND:
        raise ValueError(f"seed {seed}: at most {BEYOND // 1_000_003 - 1}; beyond are the scenes that are held out")
    return found


def held_out_scenes(config: Config, use: HeldOut, segments: int = 1) -> Iterator[Scene]:
    """`whole_scenes` of seeds that `training_seed` never gives, whatever the set: no training sees them."""
    return whole_scenes(config, (1 + HELD_OUT.index(use)) * BEYOND, segments)


def whole_scenes(config: Config, first: int, segments: int = 1) -> Iterator[Scene]:
    """Scenes of a single shot, as long as `segments` and of `data.sample_grade`, without end, from seed `first` on.

    Raises ConfigError for the changing grade, which has none.
    """
    if config.data.sample_grade == "changing":
        raise ConfigError("data.sample_grade=changing: such videos are measured by jobs/evaluate_changes.py")
    video, groups = config.video, (config.segment.groups_of(segments),)
    for number in count(first):
        scene = sample_scene(number, groups, video.height, video.width, config.data.sample_grade)
        if len(scene.shots) == 1:
            yield scene


def turned(scene: Scene) -> Scene:
    """The same scene with every direction reversed: what its caption says, turned round in the same wording."""

    def reverse(thing: Thing) -> Thing:
        other = None if thing.turned is None else OPPOSITE[thing.turned]
        return replace(thing, direction=OPPOSITE[thing.direction], turned=other)

    shots = tuple(replace(shot, things=tuple(map(reverse, shot.things))) for shot in scene.shots)
    return replace(scene, shots=shots)


def exchanged(scene: Scene) -> Scene:
    """The same scene with related objects in each other's place: their names change places in the same wording."""

    def exchange(shot: Shot) -> Shot:
        first, second, *others = shot.things
        return replace(shot, things=(second, first, *others))

    return replace(scene, shots=tuple(exchange(shot) if shot.relation else shot for shot in scene.shots))


def caption(scene: Scene) -> str:
    """The whole scene in words; equal scene, equal wording."""
    return join_shots(shot_captions(scene))


def shot_captions(scene: Scene) -> list[str]:
    """Each shot in words: the prompts of a progressive video."""
    return [_caption(scene, number) for number in range(len(scene.shots))]


def _caption(scene: Scene, number: int) -> str:
    _, words = GRADES[scene.grade]
    return words(np.random.default_rng([scene.seed, 1, number]), scene.shots[number])


def _simple(random: Random, frames: int, height: int, width: int) -> tuple[Shot, ...]:
    scale = min(height, width) / 64
    kind = random.random()
    number = 2 if kind < EQUAL_PAIRS + DIFFERENT_PAIRS else 1
    direction, speed = str(random.choice(list(DIRECTIONS))), str(random.choice(list(SPEEDS)))
    diameter = float(random.uniform(*(SEVERAL if number == 2 else ONE))) * scale
    colours, shapes = _different(random, COLOURS, 2), [str(random.choice(SHAPES)) for _ in range(2)]
    relation = None
    if kind < EQUAL_PAIRS:
        colours, shapes = [colours[0]] * 2, [shapes[0]] * 2
        # apart by more than a diameter on the torus, so that two never look like one
        angle, distance = random.uniform(0, 2 * np.pi), random.uniform(1.25 * diameter, min(height, width) / 2)
        starts = [_anywhere(random, height, width)]
        starts.append(_moved(starts[0], distance * np.cos(angle), distance * np.sin(angle), height, width))
    elif number == 2:
        relation = str(random.choice(list(RELATIONS)))
        starts = _related(random, relation, diameter, scale, height, width)
    else:
        starts = [_anywhere(random, height, width)]
    things = tuple(
        Thing(shape, colour, diameter, start, "still" if direction == "still" else "move", direction, speed)
        for shape, colour, start in zip(shapes, colours, starts, strict=False)
    )
    return (_shot(random, frames, things, relation, SIMPLE_BACKGROUNDS),)


def _returning(random: Random, frames: int, height: int, width: int) -> tuple[Shot, ...]:
    shape, colour = str(random.choice(SHAPES)), str(random.choice(list(COLOURS)))
    diameter = float(random.uniform(*ONE)) * min(height, width) / 64
    thing = Thing(shape, colour, diameter, _anywhere(random, height, width), RETURN, "still", "normal")
    return (_shot(random, frames, (thing,), None, SIMPLE_BACKGROUNDS),)


def _changing(random: Random, frames: int, height: int, width: int) -> tuple[Shot, ...]:
    """Two shots; Raises ValueError where there is no room for a group on each side of the change."""
    if frames < 2 * GROUP_FRAMES:
        raise ValueError(f"{frames} frames: the changing grade needs {2 * GROUP_FRAMES} or more (data.bucket_groups)")
    # where a latent frame begins, as prompts do: one frame, or four, after the last
    begins = [
        f for f in range(GROUP_FRAMES, frames - GROUP_FRAMES + 1) if f % GROUP_FRAMES % 4 == 1 or not f % GROUP_FRAMES
    ]
    first = int(random.choice(begins))
    before, after = (_simple(random, count, height, width)[0] for count in (first, frames - first))
    if before.relation is not None or random.random() >= TURNS:
        return before, after
    return before, _turning(random, before, after.frames, height, width)


def _turning(random: Random, before: Shot, frames: int, height: int, width: int) -> Shot:
    """The shot that goes on where `before` ends, its objects on another way, all the same one."""
    old = before.things[0].direction
    ways = [name for name in DIRECTIONS if name != old]
    way = OPPOSITE[old] if old != "still" and random.random() < REVERSALS else str(random.choice(ways))

    def on(thing: Thing) -> Thing:
        ends = track(thing, before.frames + 1, min(height, width) / 64)
        start = float(ends[0][-1] % width), float(ends[1][-1] % height)
        return replace(thing, start=start, direction=way, action="still" if way == "still" else "move")

    return replace(before, frames=frames, things=tuple(map(on, before.things)))


def _rich(random: Random, frames: int, height: int, width: int) -> tuple[Shot, ...]:
    if random.random() >= CUTS or frames < 2 * GROUP_FRAMES:
        return (_rich_shot(random, frames, height, width),)
    # a cut lies between two groups: no latent is of both shots
    first = int(random.integers(1, frames // GROUP_FRAMES)) * GROUP_FRAMES
    return _rich_shot(random, first, height, width), _rich_shot(random, frames - first, height, width)


def _rich_shot(random: Random, frames: int, height: int, width: int) -> Shot:
    scale = min(height, width) / 64
    number = 3 if random.random() < THREE else 2
    colours = _different(random, COLOURS, number)
    relation = str(random.choice(list(RELATIONS)))
    starts = _related(random, relation, 17.0 * scale, scale, height, width)
    if number == 3:  # off the line of the other two
        first = starts[0]
        across = RELATIONS[relation][::-1]
        way = float(random.uniform(*APART)) * scale
        starts.append(_moved(first, -across[0] * way, -across[1] * way, height, width))
    things = tuple(_rich_thing(random, colour, start, scale) for colour, start in zip(colours, starts, strict=True))
    pan = str(random.choice([name for name in DIRECTIONS if name != "still"])) if random.random() < PANS else "still"
    backgrounds = TEXTURES if pan == "still" else TEXTURES[1:]  # stripes look alike from wherever one pans along them
    return _shot(random, frames, things, relation, backgrounds, pan)


def _rich_thing(random: Random, colour: str, start: tuple[float, float], scale: float) -> Thing:
    action = str(random.choice(ACTIONS))
    ways = [name for name in DIRECTIONS if name != "still"]
    direction = "still" if action in ("still", "grow", "circle") else str(random.choice(ways))
    turned = None
    if action == "turn":
        turned = str(random.choice([name for name in ways if not np.dot(DIRECTIONS[name], DIRECTIONS[direction])]))
    diameter = float(random.uniform(14.0, 17.0)) * scale
    speed = str(random.choice(list(SPEEDS))) if action in ("move", "stop", "turn") else "normal"
    return Thing(str(random.choice(SHAPES)), colour, diameter, start, action, direction, speed, turned)


def _shot(
    random: Random,
    frames: int,
    things: tuple[Thing, ...],
    relation: str | None,
    backgrounds: Sequence[str],
    pan: str = "still",
) -> Shot:
    level, phase = float(random.uniform(-12, 12)), float(random.uniform(0, 2 * np.pi))
    return Shot(frames, things, relation, str(random.choice(list(backgrounds))), level, phase, pan)


def _different(random: Random, choices: Sequence[str] | dict[str, tuple[int, int, int]], count: int) -> list[str]:
    return [str(name) for name in random.choice(list(choices), count, replace=False)]


def _anywhere(random: Random, height: int, width: int) -> tuple[float, float]:
    return float(random.uniform(0, width)), float(random.uniform(0, height))


def _moved(start: tuple[float, float], dx: float, dy: float, height: int, width: int) -> tuple[float, float]:
    return float((start[0] + dx) % width), float((start[1] + dy) % height)


def _related(
    random: Random, relation: str, diameter: float, scale: float, height: int, width: int
) -> list[tuple[float, float]]:
    """Where two objects start, the first `relation` to the second.

    Along the line of the relation both lie whole in the picture. On a torus "left of" would otherwise hold across the
    seam too, and nothing at the place of the first object met would say which of the two it is.
    """
    away, aside = float(random.uniform(*APART)) * scale, float(random.uniform(-ASIDE, ASIDE)) * scale
    x, y = RELATIONS[relation]
    dx, dy = -x * away + y * aside, -y * away + x * aside

    def start(size: int, way: float, along: bool) -> float:
        edge = diameter / 2
        low, high = (edge + max(0.0, -way), size - edge - max(0.0, way)) if along else (0.0, float(size))
        return float(random.uniform(low, high))

    first = start(width, dx, bool(x)), start(height, dy, bool(y))
    return [first, _moved(first, dx, dy, height, width)]


#: How each grade's scenes are drawn, and how one of its shots is worded.
GRADES: dict[str, tuple[Callable[[Random, int, int, int], tuple[Shot, ...]], Callable[[Random, Shot], str]]] = {
    "simple": (_simple, compose),
    "rich": (_rich, compose_rich),
    "returning": (_returning, compose_returning),
    "changing": (_changing, compose),
}
