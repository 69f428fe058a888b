"""Work on rows a few at a time, in which a bad row costs only itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_pipeline.schema import Row


def in_batches(
    rows: Sequence[Row], size: int, work: Callable[[list[Row]], list[Row]], rejected: Callable[[Row, str], Row]
) -> list[Row]:
    """`work` on up to `size` rows at a time: a row for each, in their order.

    Where it raises, it is tried on each row alone; one that fails then becomes `rejected(row, error)`.
    """
    results: list[Row] = []
    for first in range(0, len(rows), size):
        batch = list(rows[first : first + size])
        try:
            results += work(batch)
        except Exception as error:  # anything: a user's captioner, or a damaged row
            if len(batch) == 1:
                results.append(rejected(batch[0], f"{type(error).__name__}: {error}"))
            else:
                results += in_batches(batch, 1, work, rejected)
    return results
