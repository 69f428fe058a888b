"""MiniLM: a BERT encoder and its word pieces, without transformers, whose import alone takes two seconds.

It computes what transformers' `BertModel` does, operation by operation (Devlin et al. 2018; layer norm behind each
part), and is called as that is; its tokenizer likewise.

Legend: B captions, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.artifact import ArtifactError, Uninitialised, one_line, read_object

#: What the public weights call the parts of a layer, and their names here. The first that fits.
_NAMES = {
    "attention.self.": "",
    "attention.output.dense": "proj",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "mlp_norm",
    "LayerNorm": "norm",
    "encoder.layer.": "layers.",
}
#: What is computed here; a configuration that leaves it out means the same.
_COMPUTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}


class Hidden(NamedTuple):
    """[B, L, D]."""

    last_hidden_state: Tensor


class _Layer(nn.Module):
    def __init__(self, dim: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{dim} channels, {heads} heads")
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj, self.attention_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps)
        self.up, self.down, self.mlp_norm = nn.Linear(dim, inner), nn.Linear(inner, dim), nn.LayerNorm(dim, eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] to the same."""
        q, k, v = (
            part(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BLD = self.attention_norm(self.proj(attended) + x_BLD)
        return self.mlp_norm(self.down(F.gelu(self.up(x_BLD))) + x_BLD)


class MiniLM(nn.Module):
    """The encoder of a configuration as transformers writes it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim, eps = config["hidden_size"], config["layer_norm_eps"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], dim)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], dim)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], dim)
        self.norm = nn.LayerNorm(dim, eps)
        sizes = (dim, config["intermediate_size"], config["num_attention_heads"], eps)
        self.layers = nn.ModuleList(_Layer(*sizes) for _ in range(config["num_hidden_layers"]))

    def forward(self, input_ids: Tensor) -> Hidden:
        """Token ids [B, L] without padding."""
        places = self.position_embeddings.weight[: input_ids.shape[1]]
        x_BLD = self.norm(self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0] + places)
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return Hidden(x_BLD)


def load_minilm(folder: Path) -> MiniLM:
    """The encoder in a folder of transformers' layout. Raises ArtifactError if it is another kind, or damaged."""
    config = read_object(folder / "config.json")
    for name, computed in _COMPUTED.items():
        if (found := config.get(name, computed)) != computed:
            raise ArtifactError(f"text encoder: {folder}: {name}={found!r}: expected a BERT with {computed!r}")
    try:
        with torch.device("meta"), Uninitialised():
            model = MiniLM(config)
        stored = {_name(name): value for name, value in load_file(folder / "model.safetensors").items()}
        model.load_state_dict({name: stored[name] for name in model.state_dict()}, assign=True)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError, OSError, SafetensorError) as error:
        raise ArtifactError(f"text encoder: {folder}: no BERT can be made of it: {one_line(error)}") from None
    return model


def _name(public: str) -> str:
    """What a weight is called here."""
    name = public.removeprefix("bert.").removeprefix("embeddings.")
    name = name.replace(".gamma", ".weight").replace(".beta", ".bias")  # as files from TensorFlow have them
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


class WordPieces:
    """The tokenizer of a folder, called as transformers' are. Raises what `tokenizers` does if there is none."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __call__(
        self, texts: str | Sequence[str], truncation: bool = False, max_length: int = 0, verbose: bool = True
    ) -> dict[str, Any]:
        """`input_ids`: of one text its ids, of several a list of each. One that is cut off ends as all do ([SEP])."""
        if isinstance(texts, str):
            return {"input_ids": self._tokenizer.encode(texts).ids}
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        if truncation:
            ids = [its if len(its) <= max_length else [*its[: max_length - 1], its[-1]] for its in ids]
        return {"input_ids": ids}
