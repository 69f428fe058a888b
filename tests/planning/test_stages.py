"""Plans: what more of something does, what is held up by what, and what ZeRO sends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arlon_ray.config import load_config
from arlon_ray.planning.dataset import Videos
from arlon_ray.planning.hardware import CPU, GPUS, H100
from arlon_ray.planning.serving import plan_serving, segment_seconds
from arlon_ray.planning.stages import (
    CPUS,
    DEVICES,
    DISKS,
    NETWORK,
    Cluster,
    Prices,
    plan_preprocess,
    plan_tokens,
    plan_training,
    rows_of,
    trained_stages,
    usable_workers,
)
from arlon_ray.planning.training import checkpoint_bytes, newton_schulz, parameters, sent_bytes

SMALL = load_config("small")
VIDEOS = Videos(1e6, 8.0)
CLUSTER = Cluster(8, H100, 1024, Prices(2.5))


def test_twice_the_videos_take_twice_as_long_and_cost_twice_as_much() -> None:
    once = plan_preprocess(SMALL, VIDEOS, CLUSTER)
    twice = plan_preprocess(SMALL, replace(VIDEOS, count=2e6), CLUSTER)
    for name in ("hours", "money", "network_bytes", "stored_bytes"):
        assert getattr(twice, name) == pytest.approx(2 * getattr(once, name))


def test_what_there_is_least_of_holds_preprocessing_up() -> None:
    few_cores = plan_preprocess(SMALL, VIDEOS, replace(CLUSTER, cpu_cores=16))
    assert few_cores.bottleneck == CPUS
    fast = replace(CLUSTER, cpu_cores=10**6, bandwidth=1e12)
    assert plan_preprocess(SMALL, VIDEOS, fast).bottleneck == DEVICES
    slow = plan_preprocess(SMALL, VIDEOS, replace(CLUSTER, cpu_cores=10**6, bandwidth=1e7))
    assert slow.bottleneck == DISKS and slow.hours == pytest.approx(slow.network_bytes / 1e7 / 3600)
    # more of what is not short changes nothing
    more = plan_preprocess(SMALL, VIDEOS, replace(CLUSTER, cpu_cores=16, gpus=16))
    assert more.hours == pytest.approx(few_cores.hours)


def test_without_gpus_everything_runs_on_the_cores() -> None:
    alone = plan_preprocess(load_config("tiny"), VIDEOS, Cluster(0, CPU, 64, Prices(0)))
    assert alone.bottleneck == CPUS and alone.gpu_hours == 0 and alone.core_hours == pytest.approx(64 * alone.hours)
    assert not alone.notes
    tiny = load_config("tiny")
    trained = plan_training(tiny, "vqvae_fine", rows_of(tiny, VIDEOS), Cluster(0, CPU, 16, Prices(0)))
    assert not trained.notes and NETWORK not in trained.parts and trained.gpu_hours == 0


def test_a_dataset_of_short_videos_has_no_clips() -> None:
    with pytest.raises(ValueError, match=r"videos of 1 s give no clip: the shortest is 2\.12 s"):
        rows_of(SMALL, Videos(10, 1.0))


def test_a_batch_keeps_only_so_many_workers_busy() -> None:
    training = SMALL.dit.training.model_copy(update={"batch_size": 48})
    assert [usable_workers(training, devices) for devices in (1, 5, 16, 1000)] == [1, 4, 16, 48]
    shared = training.model_copy(update={"batch_size": 8, "sequence_parallel": 2})
    assert [usable_workers(shared, devices) for devices in (1, 5, 1000)] == [2, 4, 16]
    planned = plan_training(SMALL, "dit", rows_of(SMALL, VIDEOS), replace(CLUSTER, gpus=256))
    assert any("keeps 64 of 256 devices busy" in note for note in planned.notes)
    assert planned.gpu_hours == pytest.approx(64 * planned.hours)


def test_epochs_are_steps() -> None:
    rows = rows_of(SMALL, VIDEOS)
    by_steps = plan_training(SMALL, "ar", rows, CLUSTER)
    epochs = SMALL.ar.training.steps * SMALL.ar.training.batch_size / rows.clips
    assert plan_training(SMALL, "ar", rows, CLUSTER, epochs).hours == pytest.approx(by_steps.hours, rel=1e-3)


def test_a_slow_network_holds_training_up() -> None:
    rows = rows_of(SMALL, VIDEOS)
    cluster = replace(CLUSTER, gpus=64, bandwidth=1e9)
    assert plan_training(SMALL, "dit", rows, cluster).bottleneck == NETWORK
    assert plan_training(SMALL, "dit", rows, replace(cluster, gpus_per_node=64)).bottleneck == DEVICES


def test_blocks_that_are_computed_again_cost_a_forward() -> None:
    rows = rows_of(SMALL, VIDEOS)
    one = replace(CLUSTER, gpus=1)
    again = load_config("small", ["ar.training.activation_checkpointing=true"])
    plain, recomputed = (plan_training(config, "ar", rows, one).parts[DEVICES] for config in (SMALL, again))
    assert 1.2 < recomputed / plain < 4 / 3


def test_zero_sends_what_its_paper_says() -> None:
    assert sent_bytes(100, 1, 2) == 0
    assert sent_bytes(100, 4, 1) == 2 * 0.75 * 400 == sent_bytes(100, 4, 2)
    assert sent_bytes(100, 4, 3) == 3 * 0.75 * 400
    # stage 1 reduces once, however many parts a batch has
    assert sent_bytes(100, 4, 1, 5) == sent_bytes(100, 4, 1) < sent_bytes(100, 4, 2, 5) < sent_bytes(100, 4, 3, 5)


def test_checkpoints_hold_what_the_optimizer_keeps() -> None:
    adamw = load_config("small", ["dit.training.optimizer=adamw", "dit.training.ema_decay=0"])
    averaged = load_config("small", ["dit.training.optimizer=adamw", "dit.training.ema_decay=0.99"])
    trained, _ = parameters(adamw, "dit")
    assert checkpoint_bytes(adamw, "dit") == 12 * trained and checkpoint_bytes(averaged, "dit") == 16 * trained
    # Muon has one moment for most
    assert 12 * trained < checkpoint_bytes(SMALL, "dit") < 16 * trained
    assert newton_schulz(4, 8) == newton_schulz(8, 4)


def test_what_is_trained_is_what_the_pipeline_trains() -> None:
    assert trained_stages(SMALL) == ["vae", "vqvae_fine", "vqvae_coarse", "ar", "dit"]
    assert trained_stages(load_config("demo")) == ["ar", "dit"]


def test_tokens_take_a_small_part_of_the_room_of_latents() -> None:
    latents, tokens = plan_preprocess(SMALL, VIDEOS, CLUSTER), plan_tokens(SMALL, VIDEOS, CLUSTER)
    assert 0 < tokens.stored_bytes < latents.stored_bytes / 4


def test_serving_needs_more_replicas_for_more_requests() -> None:
    few, many = (plan_serving(SMALL, H100, requests, 4) for requests in (10, 100_000))
    assert few.replicas == (1, 1, 1) and many.seconds == few.seconds
    assert few.first_segment_s < few.video_s
    first, later = segment_seconds(SMALL, H100, first=True), segment_seconds(SMALL, H100)
    slowest = ("ar", "dit", "decoder").index(many.bottleneck)
    busy = 100_000 / 3600 * (first[slowest] + 3 * later[slowest])
    assert many.replicas[slowest] == max(many.replicas) > 10
    assert busy / many.replicas[slowest] <= 0.7 < busy / (many.replicas[slowest] - 1)
    scaled = plan_serving(SMALL, GPUS["l4"], 100_000, 4)
    assert all(slow >= fast for slow, fast in zip(scaled.replicas, many.replicas, strict=True))
    assert sum(scaled.replicas) > sum(many.replicas)


def test_a_segment_costs_what_its_options_ask_for() -> None:
    def of(*settings: str) -> tuple[float, float, float]:
        return tuple(segment_seconds(load_config("tiny", settings), CPU))  # type: ignore[return-value]

    plain, steps, text_only = of(), of("sampling.steps=16"), of("sampling.baseline=true")
    guided = of("sampling.continued_guidance=1")
    assert 1.8 < steps[1] / plain[1] < 2 and steps[0] == plain[0]
    assert text_only[0] == 0 and text_only[1] < guided[1] and 1.5 < guided[1] / plain[1] < 2
