"""VAE and codec work group by group; tokens and latents keep their contracts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arlon_ray.artifact import ArtifactError, save_artifact
from arlon_ray.config import CodecConfig, VaeConfig
from arlon_ray.models.codec import LatentCodec, load_codec
from arlon_ray.models.vae import FoldedVAE, load_vae
from tests.bundles import randomized


@pytest.fixture(scope="module")
def vae() -> FoldedVAE:
    model = FoldedVAE(VaeConfig(latent_channels=4, width=16, deep_width=16, blocks=1))
    model.load_state_dict(randomized(model, 0))
    model.scale.fill_(2.0)
    return model.eval()


def codec(patch: tuple[int, int, int]) -> LatentCodec:
    model = LatentCodec(CodecConfig(patch=patch, width=16, blocks=1, codebook_size=64, code_dim=4), 4)
    model.load_state_dict(randomized(model, 1))
    return model.eval()


def test_groups_of_the_vae_are_coded_on_their_own(vae: FoldedVAE) -> None:
    video = torch.rand(2, 3, 34, 16, 24) * 2 - 1
    latents = vae.encode(video)
    assert latents.shape == (2, 4, 10, 2, 3)
    assert torch.allclose(latents[:, :, 5:], vae.encode(video[:, :, 17:]), atol=1e-6)
    frames = vae.decode(latents)
    assert frames.shape == video.shape
    assert torch.allclose(frames[:, :, 17:], vae.decode(latents[:, :, 5:]), atol=1e-6)


def test_the_vae_is_causal_so_that_a_picture_is_the_first_latent(vae: FoldedVAE) -> None:
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    assert torch.allclose(vae.encode(video)[:, :, :1], vae.encode(video[:, :, :1]), atol=1e-5)


def test_shift_and_scale_are_inside(vae: FoldedVAE) -> None:
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    raw = vae.posterior(video).mean
    assert torch.allclose(vae.encode(video) * vae.scale.view(-1, 1, 1, 1) + vae.shift.view(-1, 1, 1, 1), raw, atol=1e-5)


@pytest.mark.parametrize("frames, side", [(0, 16), (17, 12)])
def test_sizes_that_do_not_fit_are_refused(vae: FoldedVAE, frames: int, side: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1 frame, and sides that are multiples of 8"):
        vae.encode(torch.zeros(1, 3, frames, side, side))


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 4, 4), (5, 2, 2)])
def test_tokens_do_not_reach_across_groups(patch: tuple[int, int, int]) -> None:
    model = codec(patch)
    latents = torch.randn(2, 4, 10, 8, 4)
    tokens = model.encode(latents)
    assert tuple(tokens.shape[1:]) == model.grid(10, 8, 4)
    half = tokens.shape[1] // 2
    assert torch.equal(tokens[:, half:], model.encode(latents[:, :, 5:]))
    decoded = model.decode(tokens)
    assert decoded.shape == latents.shape
    assert torch.allclose(decoded[:, :, 5:], model.decode(tokens[:, half:]), atol=1e-5)


def test_patches_at_the_edge_reach_beyond_the_grid() -> None:
    """9×7 latents: the edge is repeated outwards, and what the tokens decode to is cut to the grid again."""
    model = codec((1, 4, 4))
    latents = torch.randn(1, 4, 5, 9, 7)
    tokens = model.encode(latents)
    assert tuple(tokens.shape[1:]) == model.grid(5, 9, 7) == (5, 3, 2)
    padded = torch.nn.functional.pad(latents, (0, 1, 0, 3, 0, 0), mode="replicate")
    assert torch.equal(tokens, model.encode(padded))
    assert model.decode(tokens, (9, 7)).shape == latents.shape
    assert torch.equal(model.decode(tokens, (9, 7)), model.decode(tokens)[..., :9, :7])


def test_tokens_are_the_nearest_codes() -> None:
    model = codec((1, 2, 2))
    latents = torch.randn(1, 4, 5, 4, 4)
    features = model.features(latents)[0]
    nearest = torch.cdist(features.reshape(-1, 4), model.codebook).argmin(-1).view(model.encode(latents)[0].shape)
    assert torch.equal(model.encode(latents)[0], nearest)


def test_finite_scalar_codes_are_a_grid_and_the_nearest_of_them_is_rounding() -> None:
    config = CodecConfig(quantizer="fsq", levels=(5, 4), code_dim=2, codebook_size=20, width=16, blocks=1)
    model = LatentCodec(config, 4).eval()
    assert model.codebook.shape == (20, 2) and model.codebook.unique(dim=0).shape == (20, 2)
    latents = 3 * torch.randn(2, 4, 5, 4, 4)
    features = model.features(latents)
    chosen = model.codebook[model.encode(latents)].reshape(features.shape)
    steps = torch.tensor([2 / 4, 2 / 3])
    rounded = ((features + 1) / steps).round().clamp(torch.zeros(2), torch.tensor([4.0, 3.0])) * steps - 1
    assert torch.allclose(chosen, rounded, atol=1e-5)
    with pytest.raises(ValueError, match="make 20 codes of 2, but codebook_size=512 and code_dim=16"):
        CodecConfig(quantizer="fsq", levels=(5, 4))


def test_foreign_tokens_and_grids_are_refused() -> None:
    model = codec((1, 2, 2))
    with pytest.raises(ValueError, match="expected 0 to 63"):
        model.decode(torch.full((1, 5, 2, 2), 64))
    with pytest.raises(ValueError, match=r"expected 5·n frames"):
        model.encode(torch.randn(1, 4, 6, 4, 4))
    with pytest.raises(ValueError, match=r"patch\[0\]"):
        CodecConfig(patch=(2, 2, 2))


def test_artefacts_give_back_the_same_model(tmp_path: Path, vae: FoldedVAE) -> None:
    save_artifact(tmp_path / "vae", kind="vae", config=vae.config.model_dump(mode="json"), tensors=vae.state_dict())
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    assert torch.allclose(load_vae(tmp_path / "vae").encode(video), vae.encode(video), atol=1e-6)
    with pytest.raises(ArtifactError, match="expected a codec artefact, found vae"):
        load_codec(tmp_path / "vae")
    weights = tmp_path / "vae" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="changed or cut short"):
        load_vae(tmp_path / "vae")
