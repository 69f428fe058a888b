"""The variants that `jobs/ablate.py` trains: what the paper claims, and what its reviewers asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """One model of the ablation: overrides of the bundle's configuration, and the rows that are measured of it."""

    name: str
    what: str
    overrides: tuple[str, ...]
    rows: tuple[str, ...] = ("guided@5", "true-tokens@5")
    stage: Literal["dit", "ar"] = "dit"


_PLAIN = ("dit.coarse_probability=0", "dit.uncertainty_probability=0")
_WRONG = tuple(f"true-tokens@5:wrong={share}" for share in ("0.1", "0.2", "0.3", "0.5"))


def _where(layers: str) -> tuple[str, ...]:
    return (f"dit.injection.layers={layers}",)


VARIANTS = (
    Variant("text-only", "no tokens: the baseline", ("dit.injection.enabled=false",),
            ("text-only@5", "text-only@30")),
    Variant("injection", "tokens of the fine codec alone", _PLAIN, ("guided@5", "true-tokens@5", *_WRONG)),
    Variant("coarser", "+ coarser tokens", ("dit.uncertainty_probability=0",), ("guided@5", "true-tokens@5", *_WRONG)),
    Variant("full", "+ uncertainty sampling: the method", (),
            ("guided@5", "true-tokens@5", *_WRONG, "guided@5:start=0.9", "guided@5:start=0.7")),
    Variant("ar-tokens", "the method, half of its fine tokens drawn by the AR", ("dit.ar_token_probability=0.5",),
            ("guided@5", "true-tokens@5", *_WRONG)),
    Variant("first-quarter", "injection into the first quarter of the layers", _where("first_quarter")),
    Variant("all-layers", "injection into all layers", _where("all")),
    Variant("last-half", "injection into the last half of the layers", _where("last_half")),
    Variant("mlp-adapter", "features added by an MLP instead of adaptive norm", ("dit.injection.kind=mlp_adapter",)),
    Variant("controlnet", "a ControlNet-like branch instead of adaptive norm", ("dit.injection.kind=controlnet",)),
    Variant("ar-narrow", "AR of half the width", ("ar.dim=96",), ("guided@5",), "ar"),
    Variant("ar-same", "AR of the preset's size, of these steps", (), ("guided@5",), "ar"),
    Variant("ar-tenth", "the same AR, a tenth of the clips", ("ar.training.data_share=0.1",), ("guided@5",), "ar"),
    Variant("ar-third", "the same AR, a third of the clips", ("ar.training.data_share=0.33",), ("guided@5",), "ar"),
    Variant("ar-plain", "the same AR, one token a step", ("ar.block=[1, 1]",), ("guided@5",), "ar"),
    Variant("ar-row", "the same AR, a row of tokens a step", ("ar.block=[1, 4]",), ("guided@5",), "ar"),
    Variant("ar-frame", "the same AR, a whole latent frame a step", ("ar.block=[4, 4]",), ("guided@5",), "ar"),
)  # fmt: skip
NAMES = tuple(variant.name for variant in VARIANTS)
