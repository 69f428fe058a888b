"""Captions as Open-Sora v1.2 was trained with: cleaned like web captions, and with scores at their end."""

from __future__ import annotations


def clean_caption(caption: str) -> str:
    """`caption` as Open-Sora's T5 saw it: lower case, without addresses, markup, file names and stray punctuation.

    The cleaning of DeepFloyd IF, run twice, as Open-Sora and PixArt do; diffusers keeps it. A caption that is cleaned
    already stays as it is in nearly all cases, but not in all: clean once, where the caption is encoded.
    """
    # imported here: it brings all that diffusers' pipelines need
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline

    for _ in range(2):
        caption = PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, caption)  # type: ignore[arg-type]
    return caption


def with_scores(
    prompt: str,
    aesthetic_score: float | None = None,
    motion_score: float | None = None,
    camera_motion: str | None = None,
) -> str:
    """`prompt` with the scores that Open-Sora appends to its training captions; one that it names itself stays."""
    scores = (
        ("aesthetic score", None if aesthetic_score is None else f"{aesthetic_score:.1f}"),
        ("motion score", None if motion_score is None else f"{motion_score:.1f}"),
        ("camera motion", camera_motion),
    )
    missing = [f"{name}: {value}." for name, value in scores if value is not None and f"{name}:" not in prompt]
    return " ".join([prompt, *missing])
