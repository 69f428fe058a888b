"""A picture of how strongly each layer of the DiT listens to the tokens: the gates, over the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GATES = "gates/"


def gates_figure(gates: Mapping[str, Sequence[tuple[int, float]]]) -> Any:
    """A matplotlib figure of {name of a layer: its (step, mean size of the gate)}: over the steps, and at the end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = sorted(gates)
    steps = sorted({step for points in gates.values() for step, _ in points})
    values = np.full((len(names), len(steps)), np.nan)
    for row, name in enumerate(names):
        for step, value in gates[name]:
            values[row, steps.index(step)] = value
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(names)), layout="constrained")
    over_time, at_the_end = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    edges = np.concatenate([[steps[0] - 0.5], (np.array(steps[:-1]) + np.array(steps[1:])) / 2, [steps[-1] + 0.5]])
    shown = over_time.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, values, vmin=0)
    figure.colorbar(shown, ax=over_time, label="mean |gate|")
    over_time.set(xlabel="step", ylabel="layer")
    over_time.yaxis.set_major_locator(MaxNLocator(integer=True))
    over_time.invert_yaxis()
    at_the_end.barh(range(len(names)), values[:, -1])
    at_the_end.set(xlabel=f"step {steps[-1]}")
    return figure
