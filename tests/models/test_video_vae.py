"""What both VAEs share: any number of frames, groups on their own, memory bounded by batches and tiles."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from arlon_ray import precision
from arlon_ray.bundle import Bundle
from arlon_ray.config import VaeConfig, load_config
from arlon_ray.models.vae import VideoVAE, build_vae, latent_frames, load_vae
from arlon_ray.models.vae.base import windows
from tests.opensora.public import randomized, small_config

WEIGHTS = Path(__file__).resolve().parents[2] / "weights" / "tiny" / "vae"


def small(kind: str, **changes: object) -> VideoVAE:
    """A VAE of random weights; the temporal one's zero padding at the first frame would hide nothing."""
    config = small_config().vae if kind == "opensora" else VaeConfig(width=16, deep_width=16, blocks=1)
    vae = build_vae(config.model_copy(update=changes)).eval()
    vae.load_state_dict(randomized(vae, 0, 0.15))
    vae.shift.copy_(torch.tensor([-0.10, 0.34, 0.27, 0.98]))
    vae.scale.copy_(torch.tensor([3.85, 2.32, 2.33, 3.06]))
    return vae


def clip(frames: int, height: int = 32, width: int = 48, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("kind", ["folded", "opensora"])
@pytest.mark.parametrize("frames, latents", [(1, 1), (4, 1), (5, 2), (16, 4), (17, 5), (18, 6), (33, 9), (34, 10)])
def test_any_number_of_frames(kind: str, frames: int, latents: int) -> None:
    vae, video = small(kind), clip(frames, 16, 24)
    coded = vae.encode(video)
    assert coded.shape == (1, 4, latents, 2, 3) and latent_frames(frames) == latents
    assert vae.decode(coded, frames).shape == video.shape
    if frames % 17 and frames != 1:
        with pytest.raises(ValueError, match="frames have"):
            vae.decode(coded, frames + 4)
    else:
        assert torch.equal(vae.decode(coded), vae.decode(coded, frames))


@pytest.mark.parametrize("kind", ["folded", "opensora"])
def test_groups_are_coded_on_their_own_whatever_the_batch(kind: str) -> None:
    video = clip(51, batch=2)
    whole = small(kind, group_batch=16).encode(video)
    alone = small(kind, group_batch=1)
    assert torch.allclose(alone.encode(video), whole, atol=1e-5)
    assert torch.allclose(alone.encode(video[1:, :, 17:34]), whole[1:, :, 5:10], atol=1e-5)
    assert torch.allclose(alone.decode(whole), small(kind, group_batch=16).decode(whole), atol=1e-4)


@pytest.mark.parametrize("kind", ["folded", "opensora"])
def test_in_bf16_it_codes_nearly_the_same_in_float32(kind: str) -> None:
    video, whole = clip(22), small(kind)
    half = small(kind).in_precision(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.shift.dtype is half.scale.dtype is torch.float32
    latents = whole.encode(video)
    for found, expected in ((half.encode(video), latents), (half.decode(latents, 22), whole.decode(latents, 22))):
        assert found.dtype is torch.float32 and 0 < (found - expected).norm() / expected.norm() < 0.05
    assert torch.equal(half.in_precision(torch.float32).shift, whole.shift)


def test_a_bundle_s_vae_is_in_the_precision_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    box, half = (Bundle(WEIGHTS.parent) for _ in range(2))
    half.config = load_config("tiny", ["vae.precision=bf16"])
    assert half.fingerprint != box.fingerprint
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    for each in (box, half):
        assert next(each.vae.parameters()).dtype is torch.float32
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    del half.vae
    assert next(half.vae.parameters()).dtype is torch.bfloat16


def test_frame_batches_of_the_spatial_half_change_nothing() -> None:
    spatial = small_config().vae.spatial
    few, many = (small("opensora", spatial=spatial.model_copy(update={"frame_batch": n})) for n in (2, 17))
    video = clip(17)
    assert torch.allclose(few.encode(video), many.encode(video), atol=1e-5)
    latents = many.encode(video)
    assert torch.allclose(few.decode(latents), many.decode(latents), atol=1e-4)


def test_windows_cover_an_axis_evenly_and_overlap_by_a_quarter() -> None:
    for size in range(8, 200, 7):
        for tile in (8, 12, 32):
            found = windows(size, tile)
            assert found[0].start == 0 and found[-1].stop == size
            if size <= tile:
                assert found == [slice(0, size)]
                continue
            assert all(window.stop - window.start == tile for window in found)
            assert all(a.stop - b.start >= tile / 4 for a, b in pairwise(found))
    assert windows(1000, 0) == [slice(0, 1000)]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4.0 / (a - b).square().mean()))


def test_tiled_and_untiled_agree_within_60_db() -> None:
    """The bound that docs/opensora.md states, on the VAE in the box and frames of 192×256 pixels."""
    whole, tiled = load_vae(WEIGHTS), load_vae(WEIGHTS, bounds=VaeConfig(tile=128))
    rows = torch.linspace(-1, 1, 192)[:, None] * torch.linspace(0.2, 1, 256)
    video = torch.stack([torch.roll(rows, 3 * t, 1) for t in range(17)])[None, None].expand(-1, 3, -1, -1, -1)
    latents = whole.encode(video)
    assert not torch.equal(tiled.encode(video), latents)
    assert float((tiled.encode(video) - latents).square().mean().sqrt()) < 0.01
    assert psnr(tiled.decode(latents), whole.decode(latents)) > 60


def test_tiled_and_untiled_agree_for_open_soras_vae_too() -> None:
    """Its norms and its attention see one tile: with random weights, which amplify that, 15 dB."""
    whole, tiled = small("opensora"), small("opensora", tile=128)
    video = clip(17, 1, 1).expand(-1, -1, -1, 192, 192) * torch.linspace(0.5, 1, 192)
    latents = whole.encode(video)
    assert psnr(tiled.decode(latents), whole.decode(latents)) > 15
    assert torch.equal(small("opensora", tile=192).decode(latents), whole.decode(latents))


def test_tiles_bound_what_the_model_is_given() -> None:
    """Sides of what reaches the model stay at the tile's, whatever the frame; the spatial half sees few frames."""
    vae = small("opensora", tile=64)
    seen: list[tuple[int, ...]] = []
    encode = vae.spatial.encode
    vae.spatial.encode = lambda x: (seen.append(tuple(x.shape)), encode(x))[1]  # type: ignore[method-assign]
    latents = vae.encode(clip(17, 136, 200))
    limit = vae.config.spatial.frame_batch
    assert seen and all(shape[0] <= limit and shape[2:] == (64, 64) for shape in seen)
    decode = vae.spatial.decode
    seen.clear()
    vae.spatial.decode = lambda x: (seen.append(tuple(x.shape)), decode(x))[1]  # type: ignore[method-assign]
    vae.decode(latents)
    assert seen and all(shape[0] <= limit and shape[2:] == (8, 8) for shape in seen)


def test_a_picture_is_the_first_latent_of_the_folded_vae() -> None:
    vae, video = small("folded"), clip(17)
    assert torch.allclose(vae.encode(video[:, :, :1]), vae.encode(video)[:, :, :1], atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tile": 100}, "tile=100"),
        ({"tile": 32}, "at least 64"),
        ({"latent_channels": 8}, "latent_channels=8 must equal"),
        ({"temporal": {"temporal_downsample": [False, False, True]}}, "halve twice"),
        ({"spatial": {"latent_channels": 8}}, "must equal temporal"),
        ({"train": True}, "only the folded VAE is trained"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VaeConfig.model_validate({"kind": "opensora", **changes})
