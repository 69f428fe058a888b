"""The forms of given frames that Open-Sora trains with: what each looks like, and how often it is drawn."""

from __future__ import annotations

import pytest
import torch

from arlon_ray.config import FrameMaskConfig, load_config
from arlon_ray.diffusion.frame_masks import FORMS, sample_noisy


def drawn(form: str, count: int = 400, frames: int = 20, overlap: int = 5) -> torch.Tensor:
    """Given frames [count, frames] (1: given) where every sample takes `form`."""
    shares = FrameMaskConfig(**{**dict.fromkeys(FORMS, 0.0), form: 1.0})
    return (~sample_noisy(shares, count, frames, overlap, torch.Generator().manual_seed(0))).int()


def runs(given: torch.Tensor) -> torch.Tensor:
    """How many separate stretches of given frames each sample has."""
    return (given.diff(dim=1, prepend=torch.zeros_like(given[:, :1])) == 1).sum(1)


@pytest.mark.parametrize("where", ["random", "head", "tail", "head_tail"])
@pytest.mark.parametrize("size", ["image", "quarter"])
def test_stretches(size: str, where: str) -> None:
    given = drawn(f"{size}_{where}")
    lengths = given.sum(1) // (2 if where == "head_tail" else 1)
    assert sorted(set(lengths.tolist())) == ([1] if size == "image" else [1, 2, 3, 4, 5])
    assert (runs(given) == (2 if where == "head_tail" else 1)).all()
    if "head" in where:
        assert given[:, 0].all()
    if "tail" in where:
        assert given[:, -1].all()
    if where == "random":
        assert given.any(0).all()  # every place is taken at some time


def test_interpolate_random_and_overlap() -> None:
    starts = {tuple(row) for row in drawn("interpolate").tolist()}
    assert starts == {tuple([1, 0] * 10), tuple([0, 1] * 10)}
    shares = drawn("random", frames=200).float().mean(1)
    assert shares.min() > 0.03 and shares.max() < 0.97 and 0.45 < shares.mean() < 0.55
    assert drawn("overlap").tolist() == [[1] * 5 + [0] * 15] * 400


def test_short_clips_are_given_nothing_and_something_is_always_left_to_do() -> None:
    for form in FORMS:
        assert not drawn(form, frames=5).any()
        assert not drawn(form, frames=1, overlap=1).any()
        assert (~drawn(form, frames=8).bool()).any(1).all()


def test_shares_are_those_of_the_configuration() -> None:
    shares = load_config("opensora-v1.2").dit.masks
    assert sum(getattr(shares, name) for name in FORMS if name != "overlap") == pytest.approx(0.25)
    given = ~sample_noisy(shares, 40_000, 20, 5, torch.Generator().manual_seed(1))
    assert float(given.any(1).float().mean()) == pytest.approx(0.5, abs=0.01)
    only_first = given[:, 0] & (given.sum(1) == 1)
    assert float(only_first.float().mean()) == pytest.approx(shares.image_head, abs=0.01)
    with pytest.raises(ValueError, match=r"add up to 1\.2"):
        FrameMaskConfig(overlap=0.7, image_head=0.5)
