"""States on disk: put together from any number of files, and refused where something is missing."""

from __future__ import annotations

import pytest
import torch

from arlon_ray.training.engine import whole_parameters
from arlon_ray.training.state import Piece, SavedState, write_state
from tests.training.regression_stage import Regression


def test_a_state_of_several_files_is_put_together(tmp_path):
    values = torch.arange(10.0)
    for rank, (start, end) in enumerate([(0, 4), (3, 10)]):
        write_state(tmp_path, [Piece("w:1", "parameter", start, values[start:end])], 7, rank, 2)
    saved = SavedState(tmp_path)
    assert saved.steps == 7 and saved.names("parameter") == {"w:1"} and not saved.has("w:1", "average")
    for start, end in ((0, 10), (2, 5), (5, 10)):
        piece = Piece("w:1", "parameter", start, torch.zeros(end - start))
        saved.fill([piece])
        assert torch.equal(piece.values, values[start:end])
    with pytest.raises(KeyError, match="w:1: parameter is not in "):
        saved.fill([Piece("w:1", "parameter", 5, torch.zeros(6))])
    (tmp_path / "state-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="1 of 2 files"):
        SavedState(tmp_path)


def test_a_gap_between_files_is_noticed(tmp_path):
    for rank, (start, end) in enumerate([(0, 4), (5, 10)]):
        write_state(tmp_path, [Piece("w", "parameter", start, torch.ones(end - start))], 1, rank, 2)
    with pytest.raises(KeyError, match="not all of it"):
        SavedState(tmp_path).fill([Piece("w", "parameter", 0, torch.zeros(10))])


def test_a_state_of_another_model_is_refused(tmp_path):
    write_state(tmp_path, whole_parameters(torch.nn.Linear(2, 2)), 1)
    with pytest.raises(KeyError, match="does not fit the model: bias, entry"):
        SavedState(tmp_path).load_into(Regression())
