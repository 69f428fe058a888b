"""The rendered world in numbers, shared by what renders it and by what reads it off pixels again."""

from __future__ import annotations

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 42, 42),
    "green": (46, 184, 66),
    "blue": (44, 84, 236),
    "yellow": (246, 214, 46),
    "purple": (190, 52, 216),
    "cyan": (48, 208, 222),
}
SHAPES = ("circle", "square", "triangle")
#: Unit vectors (x, y) in image coordinates: y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
#: Pixels a frame where the shorter side is 64 pixels.
SPEEDS = {"slow": 0.6, "normal": 0.9, "fast": 1.35}
