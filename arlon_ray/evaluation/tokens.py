"""Figures of the tokens: what the codecs lose, how well the AR predicts, and how its own samples differ from the truth.

Legend: N videos, C latent channels, t×h×w latent grid, t'×h'×w' token grid, K codes of D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from arlon_ray.bundle import Bundle
from arlon_ray.generation import default_options
from arlon_ray.generation.decoder import Choice, draw
from arlon_ray.models.codec import LatentCodec, load_codec
from arlon_ray.training.stages.codec import usage


@torch.no_grad()
def token_figures(bundle: Bundle, latents: Sequence[Tensor], texts: Sequence[str]) -> dict[str, float]:
    """Of latents [1, C, t, h, w] and their captions: latent error, codebook use and perplexity, and the AR's.

    `*_latent_error` is the squared error of the codec relative to the variance of the latents; `ar_perplexity` is
    exp(mean cross-entropy) of the true fine tokens, each given all before it.
    """
    figures: dict[str, float] = {}
    for role in ("fine", "coarse"):
        codec = load_codec(bundle.path / "vqvae" / role, bundle.device)
        tokens = [codec.encode(part) for part in latents]
        figures |= {f"{role}_{name}": value for name, value in codec_figures(codec, latents, tokens).items()}
        if role == "fine":
            figures |= _ar(bundle, tokens, texts)
    return figures


def codec_figures(codec: LatentCodec, latents: Sequence[Tensor], tokens: Sequence[Tensor]) -> dict[str, float]:
    """Of latents [1, C, t, h, w] and their tokens: `latent_error`, `codebook_used`, `codebook_perplexity`."""
    pairs = zip(latents, tokens, strict=True)
    errors = [(codec.decode(t, (x.shape[3], x.shape[4])) - x).square().mean() for x, t in pairs]
    variance = torch.cat([part.flatten() for part in latents]).var()
    used = usage(torch.cat([part.flatten() for part in tokens]), len(codec.codebook))
    return {"latent_error": float(torch.stack(errors).mean() / variance), **used}


def _logits(bundle: Bundle, text: str, true: Tensor) -> Tensor:
    """Of the AR, float32 [N tokens, K], for every true token of a video [1, t', h', w'] given those before it."""
    return bundle.ar(*bundle.text.encode([text]), true).float().flatten(0, 3)


def _ar(bundle: Bundle, tokens: Sequence[Tensor], texts: Sequence[str]) -> dict[str, float]:
    losses, hits = [], []
    for true, text in zip(tokens, texts, strict=True):
        logits = _logits(bundle, text, true)
        losses.append(F.cross_entropy(logits, true.flatten()))
        hits.append((logits.argmax(-1) == true.flatten()).float().mean())
    return {
        "ar_perplexity": float(torch.stack(losses).mean().exp()),
        "ar_accuracy": float(torch.stack(hits).mean()),
    }


@torch.no_grad()
def caption_nats(bundle: Bundle, latents: Sequence[Tensor], texts: Sequence[str], others: Sequence[str]) -> list[float]:
    """How many nats less likely the AR holds the fine tokens of each video for another caption than for its own.

    With captions turned round (left for right): 0 where the AR does not tell them apart.
    """
    found = []
    for latent, *captions in zip(latents, texts, others, strict=True):
        true = bundle.codec.encode(latent)
        own, other = (
            F.cross_entropy(_logits(bundle, text, true), true.flatten(), reduction="sum") for text in captions
        )
        found.append(float(other - own))
    return found


def wrong_tokens(tokens: np.ndarray, share: float, codes: int, seed: int) -> np.ndarray:
    """`tokens` with this share of them replaced by other codes, drawn evenly."""
    random = np.random.default_rng([seed, 77])
    shift = random.integers(1, codes, tokens.shape)
    return np.where(random.random(tokens.shape) < share, (tokens + shift) % codes, tokens).astype(tokens.dtype)


@torch.no_grad()
def error_profile(
    codec: LatentCodec, true_thw: Tensor, predicted_thw: Tensor, surprise_thw: Tensor
) -> dict[str, list[Any]]:
    """How predicted tokens differ from the true ones, each given the true tokens before it (teacher forcing).

    Per latent frame: `wrong`, the share of tokens that differ; `distance`, their distance in the codebook relative to
    that of two random codes; `loss`, the cross-entropy. And `beside`: of the wrong tokens, the share with a wrong one
    directly before or after them in time at their place, and `beside_even`, what errors of these shares would have
    that are drawn for each token by itself. `wrong_at`: the share that differs, by place [h, w].
    """
    differ = true_thw != predicted_thw
    book = codec.codebook
    apart = (book[true_thw.long()] - book[predicted_thw.long()]).norm(dim=-1)
    usual = torch.pdist(book.float()).mean()
    frames = range(len(true_thw))
    beside = torch.zeros_like(differ)
    beside[1:] |= differ[:-1]
    beside[:-1] |= differ[1:]
    share = F.pad(differ.flatten(1).float().mean(1), (1, 1))
    alone = (1 - share[:-2]) * (1 - share[2:])
    return {
        "wrong": [float(differ[t].float().mean()) for t in frames],
        "distance": [float(apart[t][differ[t]].mean() / usual) if differ[t].any() else float("nan") for t in frames],
        "loss": [float(surprise_thw[t].mean()) for t in frames],
        "beside": [float(beside[differ].float().mean()) if differ.any() else float("nan")],
        "beside_even": [float(((1 - alone) * share[1:-1]).sum() / share.sum())],
        "wrong_at": differ.float().mean(0).tolist(),
    }


@torch.no_grad()
def guide_errors(bundle: Bundle, latents: Sequence[Tensor], texts: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """How the guide ẑ that the DiT sees differs from that of the true tokens, by what it was made from.

    `ar`: tokens that the AR draws as the bundle samples (temperature, top-k, top-p, guidance), each given the true
    ones before it; `coarse`: the coarse codec's, on which the DiT trains; `wrong`: the true ones with as many wrong
    ones as the AR has, evenly spread. Of each, `error` relative to the variance of ẑ, and `statistics`: the share of it
    that a change of every channel's mean and deviation explains, which is all that uncertainty sampling imitates. And
    the AR's `profile` (`error_profile`), averaged over videos.
    """
    fine, coarse = bundle.codec, load_codec(bundle.path / "vqvae" / "coarse", bundle.device)
    generator = torch.Generator(device=bundle.device).manual_seed(seed)
    found: dict[str, list[tuple[float, float]]] = {"ar": [], "coarse": [], "wrong": []}
    profiles = []
    for number, (latent, text) in enumerate(zip(latents, texts, strict=True)):
        size = (latent.shape[3], latent.shape[4])
        true = fine.encode(latent)
        drawn, surprise = _drawn(bundle, text, true, generator)
        profiles.append(error_profile(fine, true[0], drawn[0], surprise[0]))
        share = float((drawn != true).float().mean())
        other = wrong_tokens(true.cpu().numpy(), share, len(fine.codebook), seed + number)
        guides = {
            "ar": fine.decode(drawn, size),
            "coarse": coarse.decode(coarse.encode(latent), size),
            "wrong": fine.decode(torch.from_numpy(other).to(true.device), size),
        }
        reference = fine.decode(true, size)
        for name, guide in guides.items():
            found[name].append(_guide_error(guide, reference))
    result: dict[str, Any] = {
        name: dict(zip(("error", "statistics"), np.nanmean(np.array(pairs), axis=0).tolist(), strict=True))
        for name, pairs in found.items()
    }
    result["profile"] = {
        name: np.nanmean(np.array([profile[name] for profile in profiles]), axis=0).tolist() for name in profiles[0]
    }
    return result


def _drawn(bundle: Bundle, text: str, true: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens as the bundle samples them, each given the true ones before it, and the true ones' cross-entropy.

    Raises FloatingPointError if what the AR predicts is not finite.
    """
    options, words = default_options(bundle.config.sampling), bundle.text.encode([text])
    logits = _logits(bundle, text, true)
    if not logits.isfinite().all():
        raise FloatingPointError("what the AR predicts is not finite numbers")
    surprise = F.cross_entropy(logits, true.flatten(), reduction="none").view_as(true)
    if options.ar_guidance_scale != 1.0:
        none = bundle.ar.without_text(*words, torch.ones(1, dtype=torch.bool, device=true.device))
        away = bundle.ar(*none, true).float().flatten(0, 3)
        logits = away + options.ar_guidance_scale * (logits - away)
    numbers = torch.rand(len(logits), generator=generator, device=true.device)
    return draw(logits, Choice.of([options], true.device), numbers).view_as(true), surprise


def _guide_error(guide: Tensor, reference: Tensor) -> tuple[float, float]:
    """Error relative to the variance, and the share of it that an affine map of every channel takes away."""
    ours, true = guide[0].flatten(1).double(), reference[0].flatten(1).double()
    error = (ours - true).square().mean()
    spread = true - true.mean(1, keepdim=True)
    slope = (ours * spread).sum(1, keepdim=True) / spread.square().sum(1, keepdim=True).clamp(min=1e-9)
    fitted = ours.mean(1, keepdim=True) + slope * spread
    explained = float((fitted - true).square().mean() / error) if error > 0 else float("nan")
    return float(error / true.var()), explained
