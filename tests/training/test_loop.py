import pytest
import torch

from arlon_ray.artifact import load_artifact
from arlon_ray.config import TrainingConfig
from arlon_ray.training.checkpoints import FolderCheckpoints, read_progress
from arlon_ray.training.engine import TorchEngine
from arlon_ray.training.loop import TrainingError, run_stage, train_locally
from arlon_ray.training.reporting import ConsoleReporter, duration
from tests.training.recording import Recorder
from tests.training.regression_stage import RegressionStage

MUON = TrainingConfig(
    steps=20, batch_size=12, optimizer="muon", learning_rate=0.01, warmup_steps=3, ema_decay=0.9, log_every=4,
    checkpoint_every=5, weight_decay=0.01,
)  # fmt: skip
ADAMW_BF16 = MUON.model_copy(update={"optimizer": "adamw", "precision": "bf16"})


def train(folder, training=MUON, *, key="k", interrupt_at=None, **stage):
    """Returns what was reported, and the engine."""
    recorder, engine = Recorder(interrupt_at), TorchEngine(RegressionStage(training, **stage))
    store = FolderCheckpoints(folder / "checkpoints", key)
    result = None
    try:
        result = run_stage(
            RegressionStage(training, **stage),
            engine,
            recorder,
            output=folder / "artefact",
            checkpoints=store,
            key=key,
        )
    except KeyboardInterrupt:
        assert interrupt_at
    return recorder, result


@pytest.mark.parametrize("training", [MUON, ADAMW_BF16], ids=["muon", "adamw-bf16"])
def test_resumed_equals_uninterrupted(tmp_path, training):
    whole, _ = train(tmp_path / "whole", training)
    first, _ = train(tmp_path / "parts", training, interrupt_at=10)
    assert not (tmp_path / "parts/artefact").exists()
    second, _ = train(tmp_path / "parts", training)
    assert any("going on after step 10" in line for line in second.lines)
    assert max(first.losses()) == 8
    assert min(second.losses()) == 12  # its window began before the interruption
    assert {**first.losses(), **second.losses()} == whole.losses()
    for folder in ("whole", "parts"):
        load_artifact(tmp_path / folder / "artefact", "regression")
    expected = load_artifact(tmp_path / "whole/artefact", "regression").tensors()
    found = load_artifact(tmp_path / "parts/artefact", "regression").tensors()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_loss_falls_and_everything_is_reported(tmp_path):
    recorder, result = train(tmp_path, MUON.model_copy(update={"steps": 120}))
    losses = recorder.losses()
    assert losses[120][0] < 0.5 * losses[1][0]
    assert recorder.values[120]["held_out/held_out_loss"] == result.evaluation.metrics["held_out_loss"]
    assert set(recorder.values[1]) >= {"learning_rate", "step_s", "samples_per_s", "data_wait", "grad_norm"}
    assert recorder.pictures["square"].shape == (8, 8, 3)
    assert result.artifact.lineage.metrics["held_out_loss"] == result.evaluation.metrics["held_out_loss"]
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000115", "step-00000120"]


def test_evaluations_on_the_way_change_nothing(tmp_path):
    plain, _ = train(tmp_path / "plain")
    looked, _ = train(tmp_path / "looked", MUON.model_copy(update={"evaluate_every": 8}))
    assert looked.losses() == plain.losses()
    evaluated = [step for step, values in looked.values.items() if "held_out/held_out_loss" in values]
    assert evaluated == [8, 16, 20] and looked.values[16] != looked.values[20]
    assert looked.values[20]["held_out/held_out_loss"] == plain.values[20]["held_out/held_out_loss"]


def test_the_best_checkpoint_is_kept_and_exported(tmp_path):
    # a learning rate that is too high at the end: the held-out loss rises again
    rough = {"steps": 60, "learning_rate": 0.3, "schedule": "constant", "ema_decay": 0.0, "evaluate_every": 6}
    settings = MUON.model_copy(update={**rough, "optimizer": "adamw", "keep_best": "held_out_loss"})
    recorder, result = train(tmp_path / "whole", settings)
    evaluated = {
        step: v["held_out/held_out_loss"]
        for step, v in recorder.values.items()
        if len(v) and "held_out/held_out_loss" in v
    }
    best = min(evaluated, key=evaluated.__getitem__)
    assert best < 60 and len(evaluated) == 10
    figures = result.artifact.lineage.metrics
    assert (figures["best_step"], figures["held_out_loss"]) == (best, evaluated[best])
    assert any(f"exporting the weights of step {best}," in line for line in recorder.lines)
    kept = tmp_path / "whole/checkpoints/best"
    assert read_progress(kept)["step"] == best
    # what was best before an interruption stays the best
    train(tmp_path / "parts", settings, interrupt_at=48)
    second, again = train(tmp_path / "parts", settings)
    assert any("going on after step 48" in line for line in second.lines)
    assert again.artifact.lineage.metrics == figures
    assert all(torch.equal(again.artifact.tensors()[name], its) for name, its in result.artifact.tensors().items())


def test_a_best_checkpoint_of_other_settings_does_not_count(tmp_path):
    settings = MUON.model_copy(update={"evaluate_every": 8, "keep_best": "held_out_loss"})
    train(tmp_path, settings, key="other")
    _, result = train(tmp_path, settings)
    assert result.artifact.lineage.metrics["best_step"] in (8, 16, 20)
    assert read_progress(tmp_path / "checkpoints/best")["key"] == "k"


def test_artefact_has_the_averaged_weights(tmp_path):
    slow, _ = train(tmp_path / "a", MUON.model_copy(update={"ema_decay": 0.999}))
    off, _ = train(tmp_path / "b", MUON.model_copy(update={"ema_decay": 0.0}))
    assert slow.losses() == off.losses()  # averaging does not touch the training
    averaged = load_artifact(tmp_path / "a/artefact", "regression").tensors()
    last = load_artifact(tmp_path / "b/artefact", "regression").tensors()
    assert not torch.equal(averaged["hidden.weight"], last["hidden.weight"])
    assert torch.equal(averaged["seen"], last["seen"])


def test_nan_stops_names_the_clips_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, break_at=7)
    text = str(caught.value)
    assert "step 7" in text and "the loss is nan" in text
    assert "clips of the batch: 700, 701, 702," in text and "711" in text
    assert "checkpoint of step 5 is kept" in text
    recorder, _ = train(tmp_path)
    assert any("going on after step 5" in line for line in recorder.lines)


@pytest.mark.parametrize("damage", ["cut", "one bit"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "cut", interrupt_at=15)
    newest = tmp_path / "cut/checkpoints/step-00000015/state-00000-of-00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data[:1000] if damage == "cut" else data)
    recorder, _ = train(tmp_path / "cut")
    assert "step-00000015 cannot be read" in recorder.lines[1]
    assert "going on after step 10" in recorder.lines[2]
    assert recorder.losses()[20] == whole.losses()[20]


@pytest.mark.parametrize(("was", "becomes"), [('"steps"', '"stmps"'), ('"step": 15', '"step": 14')])
def test_a_damaged_note_of_the_step_falls_back_too(tmp_path, was, becomes):
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "cut", interrupt_at=15)
    note = tmp_path / "cut/checkpoints/step-00000015/progress.json"
    assert was in note.read_text()
    note.write_text(note.read_text().replace(was, becomes))
    recorder, _ = train(tmp_path / "cut")
    assert "going on after step 10" in recorder.lines[1]
    assert recorder.losses()[20] == whole.losses()[20]


def test_what_does_not_fit_is_not_half_loaded(tmp_path):
    train(tmp_path, MUON.model_copy(update={"ema_decay": 0.0}), interrupt_at=10)
    with pytest.raises(TrainingError, match=r"step-00000010 does not fit: .*average is not in .*; remove it") as error:
        train(tmp_path)
    assert "\n" not in str(error.value)


def test_checkpoint_of_other_settings_is_not_resumed(tmp_path):
    train(tmp_path, interrupt_at=10)
    recorder, _ = train(tmp_path, key="other")
    assert not any("going on" in line for line in recorder.lines)
    assert min(recorder.losses()) == 1


def test_train_locally_leaves_only_the_artefact(tmp_path, capsys):
    train_locally(RegressionStage(MUON), tmp_path / "out", key="k", reporter=ConsoleReporter("demo", 20, bar=False))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "regression: 1,917 parameters train, 30 are frozen"
    assert lines[1].startswith("demo      1/20  loss ") and lines[1].endswith("left")
    assert any("held_out_loss" in line for line in lines)


def test_duration():
    assert [duration(s) for s in (9.4, 75, 3725)] == ["0:09", "1:15", "1:02:05"]
