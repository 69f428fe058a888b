"""What the stages do with a batch: windows, dropped parts, guidance by the right codec, starting from an artefact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arlon_ray.artifact import ArtifactError, load_artifact
from arlon_ray.config import CodecConfig, load_config
from arlon_ray.models.codec import load_codec
from arlon_ray.training.loop import train_locally
from arlon_ray.training.stages.ar import ArPaths, ArStage
from arlon_ray.training.stages.codec import CodecStage, usage
from arlon_ray.training.stages.dit import DitObjective, DitPaths, DitStage
from arlon_ray.training.stages.latents import cut, group_window, is_given, trimmed
from tests.bundles import SMALL, make_random_parts, small_config
from tests.training.recording import Recorder
from tests.training.sources import ToySource


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_random_parts(tmp_path_factory.mktemp("parts"), small_config())


def paths(parts: dict[str, Path]) -> DitPaths:
    return DitPaths(parts["vae"], parts["codec_fine"], parts["codec_coarse"])


def test_windows_are_whole_groups_and_reach_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = {group_window(4, 2, generator).start for _ in range(60)}
    assert starts == {0, 1, 2}
    assert group_window(4, 2, None) == slice(0, 2)
    assert group_window(2, 4, generator) == slice(0, 2)
    latents = torch.arange(20).view(1, 1, 20, 1, 1)
    assert cut(latents, slice(1, 3), 4, axis=2).flatten().tolist() == list(range(5, 15))


def test_an_ar_starts_on_first_frames_as_long_as_it_is_told_to(parts: dict[str, Path]) -> None:
    config = small_config("ar.first_frame_share=0.2", "ar.training.steps=10")
    source = ToySource(config, 4, groups=3)
    stage = ArStage(config, source, ArPaths(parts["codec_fine"], parts["vae"]), {})
    objective, generator = stage.objective(), torch.Generator().manual_seed(0)
    whole = source.batch(0, 0, 1)["tokens_fine"]
    (first, _, _), (later, times, _) = (objective.window(stage.batch(step, 0, 1), generator) for step in (1, 2))
    assert times is None
    assert first.shape == (4, 1, *whole.shape[2:]) and torch.equal(first, source.batch(1, 0, 1)["tokens_fine"][:, :1])
    assert later.shape[1] > 1 and later.shape[2:] == whole.shape[2:]
    assert objective(stage.batch(0, 0, 1), generator).loss.isfinite()


def test_frames_of_an_earlier_caption_are_given() -> None:
    batch = {"text_mask": torch.ones(5, 1, dtype=torch.bool), "given_frames": torch.tensor([0, 1, 2, 17, 30])}
    assert is_given(batch, 10).sum(1).tolist() == [0, 1, 2, 5, 9]  # latents begin at frames 0 1 5 9 13 17 18 22 26 30
    assert is_given(batch, 10, per_token=5).sum(1).tolist() == [0, 1, 1, 1, 2]
    assert not is_given({"text_mask": batch["text_mask"]}, 10).any()


def test_an_ar_is_not_asked_for_tokens_of_an_earlier_caption(parts: dict[str, Path]) -> None:
    config = small_config("ar.sink_groups=1", "ar.context_groups=2", "ar.first_frame_share=0", "ar.token_noise=0")
    source = ToySource(config, 4, groups=6)
    stage = ArStage(config, source, ArPaths(parts["codec_fine"], parts["vae"]), {})
    objective, generator = stage.objective().eval(), torch.Generator().manual_seed(0)
    batch = stage.batch(0, 0, 1) | {"given_frames": torch.tensor([0, 34, 51, 102])}
    shape = batch["tokens_fine"].shape
    batch["tokens_fine"] = torch.arange(6).repeat_interleave(shape[1] // 6)[None, :, None, None].expand(shape).clone()
    without_sink = set()
    for _ in range(40):
        tokens, times, asked = objective.window(batch, generator)
        groups = tokens[:, :, 0, 0]
        if times is None:  # any place, and whatever is behind the earlier caption is asked for
            without_sink.add(int(groups[0, 0]))
            assert torch.equal(asked, groups >= torch.tensor([[0], [2], [3], [6]]))
        else:  # what the clip began with is no sink of the new prompt
            assert asked[0].all() and not asked[1:].any()
    assert without_sink == {0, 1, 2}
    with torch.no_grad():
        losses = [objective(batch, torch.Generator().manual_seed(seed)).loss.isfinite() for seed in range(4)]
        changed = batch | {"given_frames": torch.full((4,), 102)}
        assert float(objective(changed, torch.Generator().manual_seed(0)).loss) == 0
    assert all(losses)


def test_a_dit_is_given_the_frames_of_an_earlier_caption(parts: dict[str, Path]) -> None:
    config = small_config()
    source = ToySource(config, 4, groups=2)
    objective = DitStage(config, source, paths(parts), {}).objective().eval()
    batch = source.batch(0, 0, 1)

    def loss(**more: torch.Tensor) -> float:
        with torch.no_grad():
            return float(objective(batch | more, torch.Generator().manual_seed(0)).loss)

    assert loss() == loss(given_frames=torch.zeros(4, dtype=torch.int64))
    assert loss(given_frames=torch.full((4,), 17)) != loss()
    assert loss(given_frames=torch.full((4,), 34)) == 0


def test_a_dit_is_given_what_clips_began_with(parts: dict[str, Path]) -> None:
    config = small_config("dit.anchor_groups=1", "dit.anchor_share=0.5", "dit.masks.overlap=0")
    source = ToySource(config, 4, groups=3)
    objective = DitStage(config, source, paths(parts), {}).objective()
    batch, own = source.batch(0, 0, 1), torch.tensor([0, 0, 17, 0])
    found = [objective._anchor(batch, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert {each.shape[2] for each in found} == {0, 5}
    assert all(torch.equal(each, batch["latents"][:, :, : each.shape[2]]) for each in found)
    generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
    assert not any(objective._anchor(batch | {"given_frames": own}, each).shape[2] for each in generators)
    for share in (0.0, 1.0):
        changed = config.model_copy(update={"dit": config.dit.model_copy(update={"anchor_share": share})})
        objective.config = changed
        losses = objective(batch, torch.Generator().manual_seed(0))
        assert losses.loss.isfinite() and 0 < losses.asked <= 4 * 10
        assert losses.tokens == 4 * objective.dit.token_count((10 + 5 * int(share), *config.latent_grid))
        losses.loss.backward()


def test_held_out_clips_count_for_what_they_are_asked(parts: dict[str, Path]) -> None:
    """A batch of which nothing is asked is no batch of loss 0."""
    config = small_config()

    class Changing(ToySource):
        given = (0, 34)

        def held_out_batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
            for seed, frames in enumerate(self.given):
                yield self._draw(seed, 4) | {"given_frames": torch.full((4,), frames)}

    source = Changing(config, 4)
    stages = [DitStage(config, source, paths(parts), {})]
    stages += [ArStage(config, source, ArPaths(parts["codec_fine"], parts["vae"]), {})]
    for stage in stages:
        objective = stage.objective().eval()
        with_both = stage.evaluate(objective, torch.device("cpu")).metrics
        source.given = (0,)
        assert with_both == stage.evaluate(objective, torch.device("cpu")).metrics and with_both["loss"] > 0
        source.given = (0, 34)


def test_an_ar_with_a_sink_sees_the_beginning_and_any_place_behind_it(parts: dict[str, Path]) -> None:
    config = small_config("ar.sink_groups=1", "ar.context_groups=2", "ar.first_frame_share=0")
    most = config.ar_window_groups
    assert most == 1 + 2 + config.segment.groups - config.segment.overlap_groups
    source = ToySource(config, 4, groups=8)
    stage = ArStage(config, source, ArPaths(parts["codec_fine"], parts["vae"]), {})
    objective, generator = stage.objective(), torch.Generator().manual_seed(0)
    batch = stage.batch(0, 0, 1)
    batch["tokens_fine"] = torch.randint(8, batch["tokens_fine"].shape, generator=generator)
    groups = batch["tokens_fine"].unflatten(1, (8, -1))
    per_group, starts = groups.shape[2], set()
    for _ in range(60):
        tokens, times, asked = objective.window(batch, generator)
        assert asked.all()
        parted = tokens.unflatten(1, (most, -1))
        (start,) = (g for g in range(1, 8) if torch.equal(parted[:, 1:], groups[:, g : g + most - 1]))
        starts.add(start)
        assert torch.equal(parted[:, 0], groups[:, 0])
        assert times.tolist() == [t + per_group * (t >= per_group and start > 1) for t in range(most * per_group)]
    assert starts == set(range(1, 8 - most + 2))
    short = {**batch, "tokens_fine": batch["tokens_fine"][:, : most * per_group]}
    assert torch.equal(objective.window(short, generator)[0], short["tokens_fine"])
    assert objective(batch, generator).loss.isfinite()


def test_text_is_cut_to_the_longest_caption() -> None:
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    text, short = trimmed({"text": torch.ones(2, 4, 3), "text_mask": mask})
    assert text.shape == (2, 3, 3) and short.tolist() == mask[:, :3].tolist()


def test_each_sample_is_guided_by_the_codec_chosen_for_it(parts: dict[str, Path]) -> None:
    objective = DitObjective(small_config(), paths(parts))
    batch = ToySource(small_config(), 6).batch(0, 0, 1)
    tokens = (batch["tokens_fine"], batch["tokens_coarse"])
    use_coarse = torch.tensor([False, True, True, False, True, False])
    mixed = objective.guide(tokens, use_coarse)
    fine, coarse = objective.fine.decode(tokens[0]), objective.coarse.decode(tokens[1])
    assert torch.allclose(mixed, torch.where(use_coarse[:, None, None, None, None], coarse, fine), atol=1e-5)
    assert torch.allclose(objective.guide(tokens, torch.ones(6, dtype=torch.bool)), coarse, atol=1e-5)


def loss(config, parts, step: int, seed: int) -> float:
    torch.manual_seed(0)
    objective = DitStage(config, ToySource(config, 6), paths(parts), {}).objective().train()
    with torch.no_grad():
        for layer in objective.dit.injection.layers.values():
            layer.out.weight.normal_(std=0.2)
        for block in objective.dit.final_layer.parameters():
            block.normal_(std=0.2)
        batch = ToySource(config, 6).batch(step, 0, 1)
        return float(objective(batch, torch.Generator().manual_seed(seed)).loss)


@pytest.mark.parametrize(
    "switch",
    ["dit.coarse_probability=1", "dit.uncertainty_probability=1", "dit.token_dropout=0.99", "dit.text_dropout=0.99",
     "dit.masks.overlap=1", "dit.masks.image_head=1", "dit.masks.random=1"],
)  # fmt: skip
def test_every_switch_changes_the_objective(switch: str, parts: dict[str, Path]) -> None:
    off = ["dit.coarse_probability=0", "dit.uncertainty_probability=0", "dit.token_dropout=0", "dit.text_dropout=0",
           "dit.masks.overlap=0", "dit.masks.image_head=0"]  # fmt: skip
    plain, switched = small_config(*off), small_config(*off, switch)
    assert loss(plain, parts, 0, 0) == loss(plain, parts, 0, 0)
    assert loss(plain, parts, 0, 0) != loss(switched, parts, 0, 0)


def test_a_guided_dit_starts_from_a_text_only_one_and_computes_the_same(parts, tmp_path: Path) -> None:
    base_config = small_config("dit.injection.enabled=false")
    base = DitStage(base_config, ToySource(base_config, 4), DitPaths(parts["vae"]), {"vae": "x"})
    objective = base.objective()
    with torch.no_grad():
        objective.dit.final_layer.linear.weight.normal_(std=0.1)
    base.export(objective, tmp_path / "base", metrics={}, key="k")
    config = small_config(f"dit.init={tmp_path / 'base'}", "dit.train_only=injection")
    guided = DitStage(config, ToySource(config, 4), paths(parts), {}).objective()
    trained = [name for name, parameter in guided.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith("dit.injection.") for name in trained)
    x, time, text = torch.randn(1, 8, 10, 8, 8), torch.tensor([500.0]), torch.randn(1, 4, config.text.dim)
    outputs = []
    for dit, coarse in ((objective.dit, None), (guided.dit, torch.randn(1, 8, 10, 8, 8))):
        condition = dit.eval().condition((10, 8, 8), text, None, torch.tensor([16.0]), (64, 64), coarse)
        outputs.append(dit(x, time, condition))
    assert torch.equal(*outputs) and outputs[0].abs().max() > 1e-3
    wrong = load_config("tiny", [*SMALL, "dit.hidden_size=48", f"dit.init={tmp_path / 'base'}"])
    with pytest.raises(ArtifactError, match="has another shape"):
        DitStage(wrong, ToySource(wrong, 4), paths(parts), {}).objective()
    assert "init" in load_artifact(tmp_path / "base", "dit").config


def test_injection_needs_codecs_and_the_baseline_none(parts: dict[str, Path]) -> None:
    config = small_config()
    with pytest.raises(ValueError, match="needs both codecs"):
        DitStage(config, ToySource(config, 4), DitPaths(parts["vae"]), {})


def test_an_ar_draws_the_tokens_of_the_samples_chosen_for_it(parts: dict[str, Path]) -> None:
    config = small_config("dit.ar_token_probability=0.5")
    with_ar = DitPaths(parts["vae"], parts["codec_fine"], parts["codec_coarse"], parts["ar"])
    stage = DitStage(config, ToySource(config, 8), with_ar, {})
    objective = stage.objective().train()
    assert not any(p.requires_grad for p in objective.ar.parameters())
    batch, generator = ToySource(config, 8).batch(0, 0, 1), torch.Generator().manual_seed(0)
    tokens, chosen = (batch["tokens_fine"], batch["tokens_coarse"]), torch.tensor([True, False] * 4)
    fine, coarse = objective._drawn_by_ar(tokens, *trimmed(batch), chosen, generator)
    assert torch.equal(fine[~chosen], tokens[0][~chosen]) and torch.equal(coarse, tokens[1])
    assert (fine[chosen] != tokens[0][chosen]).float().mean() > 0.5  # random weights rarely hit
    assert not objective.ar.training and int(fine.max()) < config.vqvae.fine.codebook_size


def test_given_frames_carry_the_dits_own_errors_and_nothing_else_changes(parts: dict[str, Path]) -> None:
    seen: dict[float, list[torch.Tensor]] = {}
    for share in (0.0, 1.0):
        heard = ("dit.text_dropout=0", "dit.token_dropout=0")
        config = small_config(f"dit.recycled_probability={share}", "dit.masks={overlap: 1.0}", *heard)
        objective = DitStage(config, ToySource(config, 8), paths(parts), {}).objective().train()
        found = seen.setdefault(share, [])
        objective.dit.register_forward_pre_hook(lambda _, inputs, found=found: found.append(inputs[0]))
        batch = ToySource(config, 8).batch(0, 0, 1)
        objective(batch, torch.Generator().manual_seed(0)).loss.backward()
        assert objective.dit.x_embedder.proj.weight.grad is not None
    (true,), (_, made) = seen[0.0], seen[1.0]  # with it, the DiT is asked twice
    overlap = small_config().segment.overlap_latents
    x0 = batch["latents"]
    assert any(torch.equal(true[:, :, :overlap], x0[:, :, at : at + overlap]) for at in range(0, x0.shape[2], overlap))
    assert torch.equal(made[:, :, overlap:], true[:, :, overlap:])
    assert not (made[:, :, :overlap] == true[:, :, :overlap]).any()


@pytest.mark.parametrize(
    "changes, rows, frames",
    [
        ((), slice(2, None), slice(0, 5)),  # of the first two an earlier caption's frames are given
        (("dit.anchor_groups=1", "dit.anchor_share=1"), slice(2, None), slice(0, 5)),
        (("dit.text_dropout=0.999",), slice(0), slice(0)),
        (("dit.token_dropout=0.999",), slice(0), slice(0)),
    ],
    ids=["given", "anchor", "without text", "without tokens"],
)
def test_what_segments_are_never_made_from_is_not_recycled(
    parts: dict[str, Path], changes: tuple[str, ...], rows: slice, frames: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_of = ("dit.recycled_probability=1", "dit.masks={overlap: 1.0}", "dit.text_dropout=0", "dit.token_dropout=0")
    config = small_config(*all_of, *changes)
    objective = DitStage(config, ToySource(config, 8), paths(parts), {}).objective().train()
    monkeypatch.setattr(objective, "_made", lambda x0, *_: torch.full_like(x0, 9))
    seen: list[torch.Tensor] = []
    objective.dit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = ToySource(config, 8).batch(0, 0, 1)
    given = torch.tensor([17, 17, *[0] * 6])
    objective(batch | ({} if config.dit.anchor_groups else {"given_frames": given}), torch.Generator().manual_seed(0))
    recycled = (seen[0] == 9).all(1).flatten(2).all(2)  # [B, t]
    anchor = config.anchor_latents
    expected = torch.zeros_like(recycled)
    expected[:, anchor:][rows, frames] = True
    if anchor:
        expected[:2, anchor : anchor + 5] = True
    assert seen[0].shape[2] == anchor + 10 and torch.equal(recycled, expected)


def test_what_a_dit_that_is_right_makes_is_the_truth(parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    objective = DitStage(small_config(), ToySource(small_config(), 8), paths(parts), {}).objective()
    x0, generator = torch.randn(4, 8, 10, 8, 8), torch.Generator().manual_seed(0)

    def right(x: torch.Tensor, time: torch.Tensor, condition: object) -> torch.Tensor:
        return (x0 - x) / (time / 1000)[:, None, None, None, None]  # x0 - noise, of x = (1 - t) x0 + t noise

    monkeypatch.setattr(objective.dit, "forward", right)
    assert torch.allclose(objective._made(x0, None, 1.0, generator), x0, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{"metric": "cosine"}, {"quantizer": "rotation"}, {"quantizer": "fsq", "levels": (4, 4, 2), "code_dim": 3}],
    ids=["cosine", "rotation", "fsq"],
)
def test_every_quantiser_learns_and_its_artefact_codes_the_same(
    changes: dict[str, object], parts: dict[str, Path], tmp_path: Path
) -> None:
    config = small_config()
    training = config.vqvae.fine.training.model_copy(update={"steps": 30, "batch_size": 8, "warmup_steps": 2})
    fine = CodecConfig.model_validate({**config.vqvae.fine.model_dump(), **changes, "training": training.model_dump()})
    stage = CodecStage(fine, "fine", 8, ToySource(config, 8), parts["vae"], {"vae": "x"}, 0)
    recorder = Recorder()
    result = train_locally(stage, tmp_path / "codec", reporter=recorder)
    assert recorder.values[30]["relative_error"] < recorder.values[1]["relative_error"]
    codec, latents = load_codec(tmp_path / "codec"), ToySource(config, 8).batch(99, 0, 1)["latents"]
    tokens = codec.encode(latents)
    error = (codec.decode(tokens) - latents).square().mean() / latents.var()
    assert float(error) < 1.05 and result.artifact.lineage.metrics["relative_error"] < 1.05
    if fine.metric == "cosine":
        assert torch.allclose(codec.codebook.norm(dim=-1), torch.ones(32), atol=1e-3)


def test_codebook_usage() -> None:
    figures = usage(torch.tensor([0, 0, 1, 1]), 4)
    assert figures["codebook_used"] == 0.5
    assert figures["codebook_perplexity"] == pytest.approx(2.0)
