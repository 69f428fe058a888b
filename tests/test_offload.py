"""Parts that wait in the CPU's memory: the same videos, each part on the device when it works and not before."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.config import load_config
from arlon_ray.generation import GenerationOptions, VideoGenerator, given_picture
from arlon_ray.offload import Offload, Turns
from tests.bundles import make_random_bundle

OPTIONS = GenerationOptions(steps=2)
TEXTS = ["a red circle", "a blue square", "a blue square"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_bundle(tmp_path_factory.mktemp("bundle") / "b")


def video(bundle: Bundle) -> np.ndarray:
    """Two segments behind a picture: every part of the bundle is used."""
    picture = np.full((64, 64, 3), 90, np.uint8)
    return np.concatenate(list(VideoGenerator(bundle).generate(TEXTS, 3, OPTIONS, given_picture(bundle, picture))))


def place(model: nn.Module) -> int:
    return next(model.parameters()).data_ptr()


class Watched:
    """A bundle's parts, and which of them lay elsewhere than where they wait whenever one of them computed."""

    def __init__(self, bundle: Bundle) -> None:
        self.parts = {"text": bundle.text.model, "ar": bundle.ar, "dit": bundle.dit, "vae": bundle.vae}
        self.waiting = {name: place(part) for name, part in self.parts.items()}
        self.seen: set[tuple[str, tuple[str, ...]]] = set()
        for name, part in self.parts.items():
            # of each part something that it cannot compute without
            first = next(module for module in part.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d))
            first.register_forward_pre_hook(lambda *_, name=name: self.seen.add((name, self.at_work())))

    def at_work(self) -> tuple[str, ...]:
        return tuple(name for name, part in self.parts.items() if place(part) != self.waiting[name])


def aligned(bundle: Bundle) -> Bundle:
    """With weights where copies lie: those of a mapped file lie anywhere, and products of them add up otherwise."""
    for part in (bundle.text.model, bundle.ar, bundle.dit, bundle.vae):
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()
    return bundle


@pytest.mark.parametrize("offload", ["text", "idle", "all"])
def test_the_videos_are_the_same(path: Path, offload: Offload) -> None:
    plain = load_bundle(path)
    expected = video(plain if offload == "text" else aligned(plain))
    assert np.array_equal(video(load_bundle(path, offload=offload)), expected)


def test_a_part_is_there_while_it_works_and_no_other_is(path: Path) -> None:
    bundle = load_bundle(path, offload="idle")
    watched = Watched(bundle)
    video(bundle)
    assert watched.seen == {(name, (name,)) for name in ("text", "ar", "dit", "vae")}
    assert watched.at_work() == ()
    still = load_bundle(path, offload="text")
    plain = Watched(still)
    video(still)  # on one device nothing moves: all are where they were loaded
    assert plain.seen == {(name, ()) for name in ("text", "ar", "dit", "vae")}


def test_a_request_that_fails_leaves_nothing_behind(path: Path) -> None:
    bundle = load_bundle(path, offload="idle")
    generator, watched = VideoGenerator(bundle), Watched(bundle)
    assert generator.planner is not None

    def stop(_: int) -> None:
        assert watched.at_work()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        list(generator.planner.plan(TEXTS, 0, OPTIONS, on_token=stop))
    tokens = next(generator.planner.plan(TEXTS, 0, OPTIONS)).tokens
    with pytest.raises(RuntimeError, match="stop"):
        generator.renderer.render(TEXTS[0], tokens, None, 0, 0, OPTIONS, on_step=stop)
    assert watched.at_work() == ()
    assert np.isfinite(generator.renderer.render(TEXTS[0], tokens, None, 0, 0, OPTIONS).latents).all()


def test_parts_of_other_threads_wait_for_their_turn() -> None:
    turns, parts = Turns(torch.device("cpu")), [nn.Linear(2, 2).requires_grad_(False) for _ in range(2)]
    for part in parts:
        turns.waits(part)
    at_work, most = set[int](), list[int]()

    @contextmanager
    def noted(number: int) -> Iterator[None]:
        with turns.at_work(parts[number]):
            at_work.add(number)
            most.append(len(at_work))
            yield
            at_work.discard(number)

    def work(number: int) -> None:
        for _ in range(20):
            with noted(number):
                time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == 40 and set(most) == {1}
    with noted(0), noted(1):  # one thread may need two
        assert len(at_work) == 2
    with turns.at_work(nn.Linear(2, 2)):  # what it was not told of needs no turn
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["idle", "all"])
def test_on_a_gpu_only_what_works_takes_memory(tmp_path: Path, offload: Offload) -> None:
    path, peaks, made = make_random_bundle(tmp_path / "b", "dit.hidden_size=768", "dit.num_heads=12"), [], []
    for kind in ("none", offload):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        bundle = load_bundle(path, "cuda", kind)  # type: ignore[arg-type]
        generator = VideoGenerator(bundle)
        idle = torch.cuda.memory_allocated()
        made.append(np.concatenate(list(generator.generate(TEXTS, 3, OPTIONS))))
        peaks.append((idle, torch.cuda.max_memory_allocated()))
        del bundle, generator
    sizes = sum(value.nbytes for part in ("ar", "dit", "vae") for value in _weights(path / part))
    (idle, peak), (idle_offloaded, peak_offloaded) = peaks
    assert idle_offloaded < idle - 0.9 * sizes and peak_offloaded < peak
    apart = np.abs(made[0].astype(int) - made[1]).mean()
    assert apart == 0 if offload == "idle" else apart < 2.0  # text by another device's arithmetic


def _weights(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


def test_the_configuration_has_no_part_in_it(path: Path) -> None:
    """How it is run is not what it is: the same fingerprint, and nothing of it in a bundle's configuration."""
    assert load_bundle(path, offload="all").fingerprint == load_bundle(path).fingerprint
    assert "offload" not in load_config("tiny").model_dump()
