"""Small checkpoints with random weights in the layouts in which Open-Sora v1.2, its VAE and T5 are public."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from arlon_ray.config import DitConfig, InjectionConfig, VaeConfig, load_config
from arlon_ray.models.dit import STDiT3
from arlon_ray.models.vae import build_vae
from tests.scripts import run_script

#: The full-size preset, with every size made small.
SMALL = [
    "video.height=64", "video.width=64", "video.fps=16", "segment.groups=2", "precision=fp32", "device=cpu",
    "vae.spatial.block_out_channels=[8,8,8,8]", "vae.spatial.layers_per_block=1", "vae.spatial.norm_num_groups=4",
    "vae.temporal.filters=8", "vae.temporal.num_res_blocks=1", "vae.temporal.num_groups=4", "vae.tile=0",
    "text.dim=16", "text.max_tokens=24", "text.precision=fp32",
    "vqvae.fine.patch=[5,2,2]", "vqvae.coarse.patch=[5,4,4]",
    "dit.depth=2", "dit.hidden_size=32", "dit.num_heads=2", "dit.caption_channels=16", "dit.model_max_length=24",
    "sampling.steps=2", "cluster.use_gpu=false", "data.encoder_gpus=0",
]  # fmt: skip
STDIT_CONFIG = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "in_channels": 4, "caption_channels": 16, "model_max_length": 24,
    "patch_size": [1, 2, 2], "mlp_ratio": 4.0, "qk_norm": True, "pred_sigma": True, "input_sq_size": 512,
    "model_type": "STDiT3", "class_dropout_prob": 0.1, "enable_flash_attn": True,
}  # fmt: skip


def small_config():
    """The preset of the public weights at sizes for tests."""
    return load_config("opensora-v1.2", SMALL)


def randomized(model: torch.nn.Module, seed: int, deviation: float = 0.2) -> dict[str, torch.Tensor]:
    """State with weights and biases drawn anew, and norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator) * deviation
        kept = "freqs" in name or name in ("shift", "scale")
        state[name] = value.clone() if kept else drawn + ("norm" in name and name.endswith("weight"))
    return state


def stdit_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A small STDiT3's tensors under their public names."""
    config = DitConfig(
        **{name: STDIT_CONFIG[name] for name in DitConfig.model_fields if name in STDIT_CONFIG},
        injection=InjectionConfig(enabled=False),
    )
    return randomized(STDiT3(config), seed)


def write_stdit(folder: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """One safetensors file and config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(STDIT_CONFIG))
    save_file(state if state is not None else stdit_state(), folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, state: dict[str, torch.Tensor], *, torch_files: bool = False) -> Path:
    """Three shards with an index, as safetensors or as PyTorch files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(STDIT_CONFIG))
    suffix, stem = ("bin", "pytorch_model") if torch_files else ("safetensors", "model")
    names, weight_map = list(state), {}
    for i in range(3):
        shard = {name: state[name].clone() for name in names[i::3]}
        file = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
        weight_map |= dict.fromkeys(shard, file)
        torch.save(shard, folder / file) if torch_files else save_file(shard, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def write_vae(folder: Path, config: VaeConfig) -> Path:
    """Open-Sora's `VideoAutoencoderPipeline`: spatial and temporal VAE in one file, shift and scale with five axes."""
    folder.mkdir(parents=True)
    state = {}
    for name, value in randomized(build_vae(config), 1, 0.3).items():
        public = name.replace("spatial.", "spatial_vae.module.", 1).replace("temporal.", "temporal_vae.", 1)
        state[public] = value
    state["shift"] = torch.tensor([-0.10, 0.34, 0.27, 0.98])[None, :, None, None, None].clone()
    state["scale"] = torch.tensor([3.85, 2.32, 2.33, 3.06])[None, :, None, None, None].clone()
    save_file(state, folder / "model.safetensors")
    settings = {"model_type": "VideoAutoencoderPipeline", "micro_frame_size": 17, "cal_loss": False}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_t5(folder: Path) -> Path:
    """A T5 with encoder and decoder in a PyTorch file, and a sentencepiece model trained on the spot."""
    import sentencepiece
    from transformers import T5Config, T5ForConditionalGeneration

    folder.mkdir(parents=True)
    words = "a red blue green circle square moves slowly to the left right up down aesthetic score motion of 0 5 6 . :"
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(" ".join(words.split()[i:] + words.split()[:i]) for i in range(20)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=60, hard_vocab_limit=False, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (folder / "spiece.vocab").unlink()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=200, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model = T5ForConditionalGeneration(config)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    return folder


def make_public_bundle(folder: Path) -> Path:
    """What jobs/import_opensora.py makes of the three."""
    sources = [
        "--stdit", str(write_stdit(folder / "stdit")), "--vae", str(write_vae(folder / "vae", small_config().vae)),
        "--text", str(write_t5(folder / "t5")),
    ]  # fmt: skip
    settings = [part for text in SMALL for part in ("--set", text)]
    result = run_script("import_opensora", *sources, *settings, "--output", str(folder / "bundle"))
    assert result.returncode == 0, result.stderr
    return folder / "bundle"
