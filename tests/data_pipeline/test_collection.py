"""What a run has to do where there is a dataset already: append, try again, or refuse by name."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from arlon_ray.artifact import ArtifactError
from data_pipeline import schema
from data_pipeline.collection import Collection, plan, source_rows
from data_pipeline.schema import REJECT, SEEN, Row, reject_row
from data_pipeline.sources import Caption, SourceFile
from tests.data_pipeline.test_staging import encoded


def source(name: str, identity: str = "1", caption: str = "c") -> SourceFile:
    """A file of the input."""
    return SourceFile(f"/{name}", name, 10, identity, Caption(caption))


def seen(clip_id: int, name: str, reason: str = "") -> Row:
    """A row of `SEEN`."""
    return {**encoded(clip_id), "source": name, "reason": reason}


@pytest.fixture
def there() -> Collection:
    """Good and half-good files, one broken, one without a caption, one too short."""
    files = [source(name) for name in ("good", "half", "broken", "short")] + [source("mute", caption="")]
    rows = [seen(1, "good"), seen(2, "half"), seen(3, "half", schema.DECODE_FAILED), seen(4, "half", schema.BLACK)]
    rejects = [
        reject_row("half", "decode", schema.DECODE_FAILED, clip_id=3, start_s=1.0, end_s=2.0),
        reject_row("half", "filter", schema.BLACK, clip_id=4, start_s=2.0, end_s=3.0),
        reject_row("broken", "clips", schema.UNREADABLE),
        reject_row("short", "clips", schema.TOO_SHORT),
        reject_row("mute", "clips", schema.MISSING_CAPTION),
    ]
    return Collection(
        source_rows(files), pa.Table.from_pylist(rows, schema=SEEN), pa.Table.from_pylist(rejects, schema=REJECT)
    )


GIVEN = [source(name) for name in ("good", "half", "broken", "short")] + [source("mute", caption="")]


def test_the_same_input_leaves_nothing_to_do(there: Collection) -> None:
    todo = plan(GIVEN, there, retry=False)
    assert todo.search == [] and todo.before.rejects.equals(there.rejects) and todo.before.seen.equals(there.seen)


def test_only_what_is_new_is_searched(there: Collection) -> None:
    todo = plan([source("another"), *GIVEN], there, retry=False)
    assert [found.name for found in todo.search] == ["another"]
    assert todo.settled == {1, 2, 3, 4} and len(todo.before.sources) == 5


def test_retrying_takes_failures_and_missing_captions_and_nothing_else(there: Collection) -> None:
    todo = plan(GIVEN[:-1] + [source("mute", caption="now it has one")], there, retry=True)
    assert [found.name for found in todo.search] == ["half", "broken", "mute"]
    # of the file that is half good only the clip that failed is open again
    assert todo.settled == {1, 2, 4}
    assert [row["source"] for row in todo.before.rejects.to_pylist()] == ["half", "short"]
    assert sorted(todo.before.sources["source"].to_pylist()) == ["good", "short"]
    assert np.array_equal(todo.before.seen["clip_id"].to_numpy(), [1, 2, 4])


def test_changed_rejects_are_named_and_wait_to_be_retried(
    there: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [source("short", identity="2"), *[found for found in GIVEN if found.name != "short"]]
    assert plan(given, there, retry=False).search == []
    assert "short changed since rejected: --retry-rejects" in capsys.readouterr().out
    assert {"short"} <= {found.name for found in plan(given, there, retry=True).search}


def test_an_input_without_what_the_dataset_is_made_of_is_refused_by_name(there: Collection) -> None:
    with pytest.raises(ArtifactError, match="--input lacks good, half that clips of this dataset are from"):
        plan([source("new")], there, retry=False)
    for changed in (source("good", identity="2"), source("good", caption="another")):
        with pytest.raises(ArtifactError, match="has other content or another caption for good"):
            plan([changed, *GIVEN[1:]], there, retry=False)
    # rejects may go: nothing of them is in the dataset
    assert plan(GIVEN[:2], there, retry=False).search == []
