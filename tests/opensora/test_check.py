"""Our modules compute what Open-Sora v1.2 computes: on its recorded numbers, and the check notices when they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arlon_ray.opensora.fixtures import check_fixtures
from tests.scripts import run_script

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="Open-Sora's numbers are not beside this checkout")
KINDS = {"stdit3", "vae_temporal", "rflow_sample"}


@needs_golden
@pytest.mark.parametrize("injection", [False, True])
def test_all_three_forms_agree(injection: bool) -> None:
    """With injection on, but untrained, the outputs are those of the public model."""
    found = list(check_fixtures(GOLDEN, injection))
    assert {agreement.kind for agreement in found} == KINDS
    assert all(agreement.ok and agreement.max_abs_error < 1e-4 for agreement in found), found


@needs_golden
def test_what_differs_is_named_and_the_others_are_still_compared(tmp_path: Path) -> None:
    """A second set in a folder below, with one weight changed, and a third whose state is cut short."""
    for i, name in enumerate(("changed", "cut")):
        (tmp_path / name).mkdir()
        for file in GOLDEN.glob("opensora_v1_2_*"):
            shutil.copy(file, tmp_path / name / file.name.replace("opensora_v1_2", f"set{i}"))
    state = load_file(tmp_path / "changed" / "set0_stdit3_state.safetensors")
    state["final_layer.linear.bias"] = state["final_layer.linear.bias"] + 0.01
    save_file(state, tmp_path / "changed" / "set0_stdit3_state.safetensors")
    cut = tmp_path / "cut" / "set1_vae_temporal_state.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    run = run_script("import_opensora", "--check", str(tmp_path))
    lines = {entry["fixture"]: entry for entry in map(json.loads, run.stdout.splitlines())}
    assert run.returncode == 1 and len(lines) == 6
    wrong = {name for name, entry in lines.items() if not entry["ok"]}
    assert wrong == {"changed/set0_stdit3", "changed/set0_rflow_sample", "cut/set1_vae_temporal"}
    assert lines["changed/set0_stdit3"]["max_abs_error"] == pytest.approx(0.01, rel=0.01)
    assert "set1_vae_temporal_config.json" in lines["cut/set1_vae_temporal"]["error"] and "3 of 6 agree" in run.stderr


@needs_golden
def test_a_fixture_that_lost_a_part_is_not_passed_over(tmp_path: Path) -> None:
    for file in GOLDEN.glob("opensora_v1_2_*"):
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # ends alike, and is none
    for name in ("stdit3_io.safetensors", "vae_temporal_config.json", "rflow_sample.json"):
        (tmp_path / f"opensora_v1_2_{name}").unlink()
    found = list(check_fixtures(tmp_path))
    assert len(found) == 3 and not any(agreement.ok for agreement in found)
    assert all("No such file" in str(agreement.error) for agreement in found)


@needs_golden
def test_an_output_that_is_no_number_is_no_agreement(tmp_path: Path) -> None:
    for file in GOLDEN.glob("opensora_v1_2_vae*"):
        shutil.copy(file, tmp_path / file.name)
    state = load_file(tmp_path / "opensora_v1_2_vae_temporal_state.safetensors")
    state["quant_conv.conv.bias"][:] = float("nan")
    save_file(state, tmp_path / "opensora_v1_2_vae_temporal_state.safetensors")
    (agreement,) = check_fixtures(tmp_path)
    assert not agreement.ok and json.loads(agreement.line())["max_abs_error"] is None


@needs_golden
def test_untrained_injection_changes_nothing_at_all() -> None:
    """To the last bit: with and without `x_mask`, and over guided sampling steps."""
    plain, injected = (list(check_fixtures(GOLDEN, injection)) for injection in (False, True))
    assert [agreement.max_abs_error for agreement in plain] == [agreement.max_abs_error for agreement in injected]


def test_a_folder_without_fixtures_is_refused(tmp_path: Path) -> None:
    run = run_script("import_opensora", "--check", str(tmp_path))
    assert run.returncode == 2 and "no fixture" in run.stderr and not run.stdout


@needs_golden
def test_full_size_vae_has_the_public_names_and_shapes() -> None:
    from arlon_ray.config import TemporalVaeConfig
    from arlon_ray.models.vae.temporal import TemporalVAE

    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in TemporalVAE(TemporalVaeConfig()).state_dict().items()}
    assert shapes == json.loads((GOLDEN / "opensora_v1_2_vae_temporal_keys.json").read_text())


@needs_golden
def test_the_preset_is_the_public_size_and_lists_what_injection_adds() -> None:
    from arlon_ray.config import load_config
    from arlon_ray.models.dit import STDiT3

    with torch.device("meta"):
        shapes = {n: list(v.shape) for n, v in STDiT3(load_config("opensora-v1.2").dit).state_dict().items()}
    added = {name for name in shapes if name.startswith("injection.")}
    public = json.loads((GOLDEN / "opensora_v1_2_stdit3_xl2_keys.json").read_text())
    assert {name: shape for name, shape in shapes.items() if name not in added} == public
    assert {name.split(".")[1] for name in added} == {"adapter", "layers"}
    assert {int(name.split(".")[2]) for name in added if ".layers." in name} == set(range(14))
