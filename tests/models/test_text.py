"""The real MiniLM: same values in any company, truncation, and a refusal of other weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arlon_ray.artifact import ArtifactError
from arlon_ray.config import load_config
from arlon_ray.models.text import KEPT, TextEncoder, load_text_encoder

CAPTIONS = ["a red circle moves to the right", "two blue squares", "a green triangle that slowly floats upwards"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_text_encoder(load_config("tiny").text)


def test_values_do_not_depend_on_the_company(encoder: TextEncoder) -> None:
    together = encoder.encode(CAPTIONS)
    assert together.values.shape == (3, 32, 384)
    for i, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        assert torch.equal(alone.values[0], together.values[i]) and torch.equal(alone.mask[0], together.mask[i])
        assert int(alone.mask.sum()) == encoder.count_tokens(caption)
    assert not together.values[~together.mask].any()


def test_like_captions_are_near_and_long_ones_are_cut(encoder: TextEncoder) -> None:
    values = [encoder.encode([text]).values[0].sum(0) for text in ("a red circle", "a red disc", "stock market news")]
    near, far = (torch.cosine_similarity(values[0], other, dim=0) for other in values[1:])
    assert near > far + 0.1
    long = "very " * 100 + "long"
    assert encoder.count_tokens(long) > 32 and bool(encoder.encode([long]).mask.all())
    with pytest.raises(ValueError, match="no captions"):
        encoder.encode([])


def test_what_segments_ask_for_again_and_again_is_computed_once(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    model = encoder.model.forward

    def counted(**arguments: torch.Tensor) -> object:
        asked.append(1)
        return model(**arguments)

    monkeypatch.setattr(encoder.model, "forward", counted)
    captions = [f"A red circle moves {number} pixels." for number in range(KEPT)]
    values = [encoder.encode([caption]).values for caption in captions * 2]
    assert len(asked) == KEPT and all(map(torch.equal, values[:KEPT], values[KEPT:]))
    encoder.encode(["One more"])  # makes room
    encoder.encode(captions[-1:])
    assert len(asked) == KEPT + 1
    assert torch.equal(encoder.encode(captions[:1]).values, values[0]) and len(asked) == KEPT + 2
    encoder.encode(captions[-2:])  # of many together, as datasets are made, nothing is kept
    assert len(asked) == KEPT + 4


def test_other_widths_and_missing_weights_are_refused(tmp_path: Path) -> None:
    text = load_config("tiny").text
    with pytest.raises(ArtifactError, match=r"width 384, but text.dim=100"):
        load_text_encoder(text.model_copy(update={"dim": 100}))
    with pytest.raises(ArtifactError, match="is missing"):
        load_text_encoder(text.model_copy(update={"path": str(tmp_path)}))


def test_the_first_layers_tell_left_from_right(encoder: TextEncoder) -> None:
    """Why `tiny` reads MiniLM's third layer: in its last one the two words are much alike."""
    text, pair = load_config("tiny").text, ["a red circle moves to the left", "a red circle moves to the right"]

    def apart(one: TextEncoder) -> float:
        left, right = one.encode(pair).values
        return float((left - right).norm() / left.norm())

    whole = load_text_encoder(text.model_copy(update={"layers": None}))
    assert text.layers == 3 and apart(encoder) > 1.05 * apart(whole)
    assert encoder.identity == f"{whole.identity}:layers=3"
    with pytest.raises(ArtifactError, match="layers=7: this minilm has 6"):
        load_text_encoder(text.model_copy(update={"layers": 7}))
