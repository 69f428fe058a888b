"""Public layouts become artefacts, unchanged to the bit; what is wrong with them is named, and nothing is written."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arlon_ray.artifact import ArtifactError, load_artifact
from arlon_ray.bundle import load_bundle
from arlon_ray.models.dit import load_dit
from arlon_ray.models.text import load_text_encoder, load_token_counter, text_identity
from arlon_ray.models.vae import build_vae, load_vae
from arlon_ray.opensora.checkpoint import Checkpoint, locate
from arlon_ray.opensora.importing import import_stdit, import_text, import_vae
from tests.opensora.public import (
    SMALL,
    small_config,
    stdit_state,
    write_sharded,
    write_stdit,
    write_t5,
    write_vae,
)
from tests.scripts import run_script

ROOT = Path(__file__).resolve().parents[2]


def imported(source: Path, output: Path):
    return import_stdit(source, output, small_config().dit, {"vae": "v"})


def same(path: Path, state: dict[str, torch.Tensor]) -> bool:
    stored = load_file(path / "model.safetensors")
    return stored.keys() == state.keys() and all(torch.equal(stored[name], state[name]) for name in state)


@pytest.mark.parametrize("layout", ["single", "shards", "torch shards", "pth", "ema of a training", "old pth", "bf16"])
def test_every_layout_gives_the_same_artefact(tmp_path: Path, layout: str) -> None:
    state, source = stdit_state(), tmp_path / "public"
    if layout == "single":
        write_stdit(source, state)
    elif layout == "bf16":
        state = {name: value.bfloat16() for name, value in state.items()}
        write_stdit(source, state)
    elif "shards" in layout:
        write_sharded(source, state, torch_files=layout == "torch shards")
    else:
        source = tmp_path / "model.pth"
        wrapped = {"ema": {f"module.{n}": v for n, v in state.items()}, "step": 3} if "ema" in layout else state
        torch.save(wrapped, source, _use_new_zipfile_serialization=layout != "old pth")
    artifact = imported(source, tmp_path / "dit")
    assert same(tmp_path / "dit", state)
    assert artifact.lineage.parents["vae"] == "v" and any("source:" in name for name in artifact.lineage.parents)
    dit = load_dit(tmp_path / "dit")
    assert torch.equal(dit.x_embedder.proj.weight, state["x_embedder.proj.weight"].float())


def broken(folder: Path, kind: str) -> Path:
    """A public STDiT3 with one thing wrong."""
    state = stdit_state()
    if kind == "missing":
        del state["t_block.1.bias"]
    elif kind == "unexpected":
        state["pos_embed_temporal"] = torch.zeros(3)
    elif kind == "shape":
        state["t_block.1.bias"] = torch.zeros(7)
    elif kind in ("no pickle of tensors", "a list", "a tensor's file cut short"):
        folder.mkdir()
        file = folder / "pytorch_model.bin"
        torch.save({"no pickle of tensors": {"model": Path("x")}, "a list": [1, 2]}.get(kind, state), file)
        if "cut" in kind:
            file.write_bytes(file.read_bytes()[:-5000])
        return folder
    elif kind == "shard missing":
        write_sharded(folder, state)
        (folder / "model-00002-of-00003.safetensors").unlink()
        return folder
    elif kind == "shard half there":
        shard = write_sharded(folder, state) / "model-00002-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1000])
        return folder
    elif kind == "shard of another index":
        write_sharded(folder, state)
        other = load_file(folder / "model-00001-of-00003.safetensors")
        save_file(other, folder / "model-00003-of-00003.safetensors")
        return folder
    elif kind == "pointer":
        write_stdit(folder, state)
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
        return folder
    elif kind == "legacy":
        write_stdit(folder, state)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "qk_norm_legacy": True}))
        return folder
    elif kind == "pointer to a pickle":
        folder.mkdir()
        (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
        return folder
    elif kind == "a shard with more than the index says":
        shard = write_sharded(folder, state) / "model-00002-of-00003.safetensors"
        save_file({**load_file(shard), "extra": torch.zeros(2)}, shard)
        return folder
    elif kind == "an index of numbers":
        folder.mkdir()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
        return folder
    elif kind == "numbers for names":
        folder.mkdir()
        torch.save({1: torch.zeros(2)}, folder / "pytorch_model.bin")
        return folder
    elif kind == "a type we do not know":
        state["t_block.1.bias"] = state["t_block.1.bias"].to(torch.float8_e4m3fn)
    elif kind == "empty":
        folder.mkdir()
        return folder
    return write_stdit(folder, state)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", r"tensor t_block\.1\.bias is missing"),
        ("unexpected", r"tensor pos_embed_temporal \[3\] is not expected"),
        ("shape", r"tensor t_block\.1\.bias: found \[7\], expected \[192\]"),
        ("no pickle of tensors", "Python objects other than tensors"),
        ("a list", "holds a list: expected a state dict"),
        ("a tensor's file cut short", "cut short"),
        ("shard missing", r"model-00002-of-00003\.safetensors: missing"),
        ("shard half there", r"model-00002-of-00003\.safetensors: cut short: tensor .* ends at byte"),
        ("shard of another index", r"model-00003-of-00003\.safetensors: tensor .* is missing"),
        ("pointer", "no safetensors file"),
        ("legacy", "qk_norm_legacy=True: expected False"),
        ("empty", "found no weights"),
        ("pointer to a pickle", "Git LFS pointer"),
        ("a shard with more than the index says", r"tensor extra \[2\] is not expected"),
        ("an index of numbers", "expected a weight_map"),
        ("numbers for names", "expected a state dict"),
        ("a type we do not know", r"tensor t_block\.1\.bias is of type F8_E4M3"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path: Path, kind: str, message: str) -> None:
    source = broken(tmp_path / "public", kind)
    with pytest.raises(ArtifactError, match=message) as raised:
        imported(source, tmp_path / "out" / "dit")
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_source_is_a_path_or_a_hub_name(tmp_path: Path) -> None:
    assert locate(str(tmp_path), "--vae") == tmp_path
    with pytest.raises(ArtifactError, match=r"--vae \./nothing: not found"):
        locate("./nothing", "--vae")
    with pytest.raises(ArtifactError, match="the hub did not give it"):
        locate("no-such-owner-of-anything/nothing", "--vae")
    with pytest.raises(ArtifactError, match="not the name of a file"):
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret"}}')
        Checkpoint(tmp_path)


def test_the_vae_is_imported_with_its_shift_and_scale_and_old_attention_names(tmp_path: Path) -> None:
    config = small_config().vae
    source = write_vae(tmp_path / "public", config)
    import_vae(source, tmp_path / "vae", config)
    vae = load_vae(tmp_path / "vae")
    assert vae.shift.tolist() == pytest.approx([-0.10, 0.34, 0.27, 0.98])
    assert vae.scale.tolist() == pytest.approx([3.85, 2.32, 2.33, 3.06])
    state = load_file(source / "model.safetensors")
    assert torch.equal(vae.temporal.decoder.conv1.conv.weight, state["temporal_vae.decoder.conv1.conv.weight"])
    bare = {name: value for name, value in state.items() if name not in ("shift", "scale")}
    torch.save(bare, tmp_path / "bare.pth")
    import_vae(tmp_path / "bare.pth", tmp_path / "bare", config)  # the public loader sets them where they are missing
    assert torch.equal(load_vae(tmp_path / "bare").scale, vae.scale)
    renamed = {}
    for name, value in state.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                value = value[:, :, None, None] if value.ndim == 2 else value
        renamed[name] = value.contiguous()
    assert renamed.keys() != state.keys()
    save_file(renamed, source / "model.safetensors")
    import_vae(source, tmp_path / "old", config)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("vae", "old"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    return import_text(write_t5(folder / "public"), folder / "text").path


def test_t5_keeps_its_encoder_alone_and_computes_the_same(t5: Path) -> None:
    from transformers import T5ForConditionalGeneration

    stored = load_file(t5 / "model.safetensors")
    assert not any(name.startswith(("decoder", "lm_head")) for name in stored)
    config = small_config().text.model_copy(update={"path": str(t5), "cleaning": "none", "aesthetic_score": None})
    encoder = load_text_encoder(config)
    assert encoder.identity == text_identity(config) == f"t5:{load_artifact(t5, 'text').fingerprint[:16]}"
    embedding = encoder.encode(["a red circle moves slowly", "a blue square"])
    assert embedding.values.shape == (2, 24, 16)
    # the public way: all captions padded to the full length, with a mask
    public = T5ForConditionalGeneration.from_pretrained(t5.parent / "public").encoder.eval()
    padded = encoder.tokenizer(["a red circle moves slowly"], max_length=24, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        theirs = public(padded["input_ids"], attention_mask=padded["attention_mask"]).last_hidden_state
    length = int(padded["attention_mask"].sum())
    assert embedding.mask[0].sum() == length == load_token_counter(config)("a red circle moves slowly")
    assert torch.allclose(embedding.values[0, :length], theirs[0, :length], atol=1e-5)


def test_cleaning_is_part_of_the_encoder_and_of_its_identity(t5: Path) -> None:
    plain, cleaned = (
        small_config().text.model_copy(update={"path": str(t5), "cleaning": cleaning, "aesthetic_score": score})
        for cleaning, score in (("none", None), ("opensora", 6.5))
    )
    assert text_identity(plain) != text_identity(cleaned)
    caption = "A RED circle <b>moves</b> www.example.com/x"
    a, b = (
        load_text_encoder(config).encode([text])
        for config, text in ((cleaned, caption), (plain, "a red circle moves aesthetic score: 6.5."))
    )
    assert torch.equal(a.values, b.values) and torch.equal(a.mask, b.mask)


def test_a_damaged_t5_is_named(tmp_path: Path, t5: Path) -> None:
    copy = Path(shutil.copytree(t5, tmp_path / "text"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="is not the recorded"):
        load_text_encoder(small_config().text.model_copy(update={"path": str(copy)}))


def test_the_type_of_t5_is_the_configured_one_whatever_its_public_settings_say(tmp_path: Path) -> None:
    source = write_t5(tmp_path / "public")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "torch_dtype": "float16", "dtype": "float16"}))
    text = import_text(source / "pytorch_model.bin", tmp_path / "text").path  # the file itself may be named
    public = torch.load(source / "pytorch_model.bin", weights_only=True)
    encoder = load_text_encoder(small_config().text.model_copy(update={"path": str(text)}))
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(encoder.model.state_dict()[name], public[name])


def test_t5_needs_to_be_imported_and_whole(tmp_path: Path, t5: Path) -> None:
    config = small_config().text
    with pytest.raises(ArtifactError, match=r"text\.path is not set"):
        load_text_encoder(config)
    with pytest.raises(ArtifactError, match="not a text artefact"):
        load_text_encoder(config.model_copy(update={"path": str(t5.parent / "public")}))
    with pytest.raises(ArtifactError, match=r"width 16, but text\.dim=99"):
        text_identity(config.model_copy(update={"path": str(t5), "dim": 99}))
    source = write_t5(tmp_path / "public")
    (source / "spiece.model").unlink()
    with pytest.raises(ArtifactError, match="no tokenizer"):
        import_text(source, tmp_path / "text")


def test_the_job_makes_a_bundle_that_renders(tmp_path: Path) -> None:
    config = small_config()
    sources = [
        "--stdit", str(write_stdit(tmp_path / "stdit")), "--vae", str(write_vae(tmp_path / "vae", config.vae)),
        "--text", str(write_t5(tmp_path / "t5")),
    ]  # fmt: skip
    settings = [part for text in SMALL for part in ("--set", text)]
    result = run_script("import_opensora", *sources, *settings, "--output", str(tmp_path / "bundle"))
    assert result.returncode == 0, result.stderr
    bundle = load_bundle(tmp_path / "bundle")
    assert not bundle.guided and bundle.config.sampling.baseline
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "stdit", "t5", "vae"]
    assert (tmp_path / "bundle" / "text" / "spiece.model").is_file()
    assert bundle.artifacts["dit_base"].lineage.parents["vae"] == bundle.artifacts["vae"].fingerprint
    flags = ["--bundle", str(tmp_path / "bundle"), "--prompt", "a red circle", "--output", str(tmp_path / "video.mp4")]
    video = run_script("generate", *flags)
    assert video.returncode == 0, video.stderr
    assert "34 frames" in video.stdout
    again = run_script("import_opensora", *sources, *settings, "--output", str(tmp_path / "bundle"))
    assert again.returncode == 2 and "is there already" in again.stderr


def test_the_job_refuses_bad_input_in_one_line(tmp_path: Path) -> None:
    bad = broken(tmp_path / "public", "shape")
    result = run_script("import_opensora", "--stdit", str(bad), "--output", str(tmp_path / "out"))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "found [7], expected [192]" in result.stderr and not (tmp_path / "out").exists()
    assert run_script("import_opensora", "--check", str(tmp_path), "--vae", "x").returncode == 2
    result = run_script("import_opensora", "--stdit", str(bad), "--vae", "", "--output", str(tmp_path / "out"))
    assert result.returncode == 2 and "--vae: empty" in result.stderr
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    good = write_stdit(tmp_path / "good")
    for output, expected in (("file", "is a file"), ("file/x", "not a folder"), ("other", "is there already")):
        result = run_script("import_opensora", "--stdit", str(good), "--output", str(tmp_path / output))
        assert result.returncode == 2 and expected in result.stderr
    flags = ["--stdit", str(good), "--output", str(tmp_path / "other"), "--overwrite"]
    result = run_script("import_opensora", *flags)
    assert result.returncode == 2 and (tmp_path / "other" / "thesis.txt").exists()


@pytest.mark.slow
def test_full_size_weights_are_imported_with_little_memory(tmp_path: Path) -> None:
    """Random STDiT3-XL/2 in bf16, 2.4 GB: the import's peak is below 1.3 times the file."""
    from arlon_ray.config import DitConfig, InjectionConfig
    from arlon_ray.models.dit import STDiT3

    with torch.device("meta"):
        shapes = {
            n: v.shape for n, v in STDiT3(DitConfig(injection=InjectionConfig(enabled=False))).state_dict().items()
        }
    source = tmp_path / "public"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"depth": 28, "hidden_size": 1152, "num_heads": 16}))
    save_file({n: torch.randn(s, dtype=torch.bfloat16) * 0.02 for n, s in shapes.items()}, source / "model.safetensors")
    size = (source / "model.safetensors").stat().st_size
    assert size > 2.2e9
    command = [sys.executable, "jobs/import_opensora.py", "--stdit", str(source), "--output", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert result.returncode == 0, result.stderr
    assert peak < 1.3 * size, f"peak {peak / 2**30:.2f} GiB for a file of {size / 2**30:.2f} GiB"
    dit = load_dit(tmp_path / "out" / "dit_base", dtype=torch.bfloat16)
    assert sum(p.numel() for p in dit.parameters()) > 1.1e9


def test_a_vae_of_another_kind_is_not_imported(tmp_path: Path) -> None:
    config = small_config().vae
    source = write_vae(tmp_path / "public", config)
    with pytest.raises(ArtifactError, match=r"vae\.kind=folded"):
        import_vae(source, tmp_path / "vae", config.model_copy(update={"kind": "folded"}))
    assert build_vae(config).latent_channels == 4
