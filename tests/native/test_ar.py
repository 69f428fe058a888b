"""The AR's step in C++ gives what torch's operations give, whatever is beside it and however many threads work."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from arlon_ray import native
from arlon_ray.config import ArConfig
from arlon_ray.generation.decoder import Decoder, Layout
from arlon_ray.generation.native_step import NativeTrunk
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.generation.products import Products
from arlon_ray.generation.trunk import AttentionByIndex, Trunk
from arlon_ray.models.ar import ArTransformer, KeyValueCache
from arlon_ray.models.quantised import Int8Linear, quantise

ROWS, POSITIONS = 11, 70


class Beginning:
    """A model and rows that are differently far, with texts of different lengths."""

    def __init__(self, heads: int = 2, channels: int = 24) -> None:
        torch.manual_seed(0)
        config = ArConfig(dim=heads * channels, layers=3, heads=heads)
        self.model = ArTransformer(config, codebook_size=64, text_dim=8, max_text=6).requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        self.cache = KeyValueCache(self.model, ROWS, POSITIONS)
        self.cache.values.normal_()
        angles = torch.randn(ROWS, POSITIONS, 2, channels // 2)
        self.turns = torch.polar(torch.ones_like(angles), angles)
        self.filled = torch.tensor([0, 1, 2, 6, 7, 8, 15, 16, 40, 63, 69])
        self.visible = torch.rand(ROWS, POSITIONS) > 0.3
        self.visible[torch.arange(ROWS), self.filled] = True
        self.x = torch.randn(ROWS, config.dim)

    def native(self) -> NativeTrunk:
        products = Products(self.model.head.weight)
        assert products.native is not None
        return NativeTrunk(products.native, self.model, products, self.cache, self.turns, self.filled, self.visible)

    def plain(self, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(native, "library", lambda: None)
            trunk = Trunk(self.model, Products(self.model.head.weight))
        at = torch.arange(ROWS) * POSITIONS + self.filled
        return trunk(self.x, self.turns, at, AttentionByIndex(self.cache, self.filled, self.visible, POSITIONS))


@pytest.mark.parametrize("heads, channels", [(2, 24), (3, 64), (1, 56), (2, 8)])
def test_the_trunk_is_that_of_torch(
    built: ctypes.CDLL, heads: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Beginning(heads, channels), Beginning(heads, channels)
    expected, found = one.plain(monkeypatch), other.native()(other.x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(other.cache.values, one.cache.values, rtol=1e-4, atol=1e-4)
    assert not torch.equal(other.cache.values, Beginning(heads, channels).cache.values)


@pytest.mark.parametrize("channels", [4, 12, 20, 36, 64])
def test_a_normed_product_of_any_width_is_that_of_torch(built: ctypes.CDLL, channels: int) -> None:
    torch.manual_seed(0)
    x, weight, norm = torch.randn(5, channels), torch.randn(24, channels), torch.rand(channels)
    panels, eps = native.Panels(built, weight), 1e-3
    expected = (x * (x.square().sum(-1, keepdim=True) + eps).rsqrt() * norm) @ weight.T
    found = native.product(built, x, panels, 24, None, norm, eps)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    for row in range(5):
        alone = native.product(built, x[row : row + 1].clone(), panels, 24, None, norm, eps)
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 19])
def test_weights_in_the_fewest_bytes_that_say_them_give_the_same_product(
    built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, kept: torch.dtype, rows: int
) -> None:
    torch.manual_seed(0)
    weight, x, added = torch.randn(83, 24).to(kept).float(), torch.randn(rows, 24), torch.randn(rows, 83)
    if kept is torch.bfloat16:
        weight[50] *= 2.0**20  # more than halves hold
    weight[0, :3] = torch.tensor([2.0**-24, -0.0, 0.0])  # the smallest half
    panels = native.Panels(built, weight)
    monkeypatch.setattr(native, "_narrow", lambda weight, _: weight)
    plain = native.Panels(built, weight)
    offered = built.kinds() & {torch.float16: 2, torch.bfloat16: 4}.get(kept, 1)
    assert plain.numbers.dtype is torch.float32 and panels.numbers.dtype is (kept if offered else torch.float32)
    found, large = native.product(built, x, panels, 83, added), weight.abs().sum(1)
    assert torch.equal(found, native.product(built, x, plain, 83, added))
    assert torch.allclose(found / large, (x @ weight.T + added) / large, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 19])
def test_products_with_bytes_are_those_of_the_layer(built: ctypes.CDLL, rows: int) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(40, 83, bias=False))
    x, added = torch.randn(rows, 40), torch.randn(rows, 83)
    products = Products(torch.zeros(1))
    assert products.panels(layer).numbers.dtype is torch.int8
    assert torch.allclose(products.of(layer)(x, added), layer(x) + added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", ["float16", "bfloat16", "int8"])
def test_the_trunk_with_narrow_weights_is_that_of_torch(
    built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    one, other = Beginning(), Beginning()
    for beginning in (one, other):
        if kept == "int8":
            quantise(beginning.model)
        else:
            for block in beginning.model.blocks:
                for linear in (block.qkv, block.proj, block.gate_up, block.down):
                    linear.weight.copy_(linear.weight.to(getattr(torch, kept)))
    expected, found = one.plain(monkeypatch), other.native()(other.x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(other.cache.values, one.cache.values, rtol=1e-4, atol=1e-4)


def test_a_row_is_the_same_whatever_is_beside_it_and_for_any_number_of_threads(
    built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(native, "threads", lambda *_: torch.get_num_threads())  # however little there is to do
    together = Beginning()
    expected = together.native()(together.x.clone())
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in range(1, ROWS + 1):
                begun = Beginning()
                assert torch.equal(begun.native()(begun.x[:rows].clone()), expected[:rows])
    finally:
        torch.set_num_threads(threads)


def decoder_of(block: tuple[int, int], codes: int, members: int, rows: int, channels: int = 24) -> Decoder:
    """Members that draw in different ways, some of them guided, each of which the trunk has given something else."""
    torch.manual_seed(0)
    config = ArConfig(dim=2 * channels, layers=1, heads=2, block=block)
    model = ArTransformer(config, codebook_size=codes, text_dim=8, max_text=6).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    decoder = Decoder(model, 4, members)
    choices = [{"temperature": 0.5}, {"top_k": 1}, {"top_k": 9, "top_p": 0.7}, {"top_p": 0.3}, {"top_k": codes + 9}]
    options = [
        GenerationOptions.model_validate(choices[n % 5] | {"ar_guidance_scale": 1 + n % 3}) for n in range(members)
    ]
    # the first ones have a row without text behind all that have one
    guided = rows - members
    owners, away = [*range(members), *range(guided)], [*range(members, rows), *range(guided, members)]
    decoder.arrange(Layout(owners, list(range(members)), away, options))
    decoder.numbers.uniform_()
    decoder.numbers[:3] = torch.tensor([0.0, 1 - 2**-24, 1 - 2**-24])[:, None, None]
    if block != (1, 1):  # a block of one token lies within the grid
        decoder.inner.copy_(torch.rand(decoder.inner.shape) > 0.2)
    decoder.count.random_(4)
    decoder.state.normal_()
    return decoder


def drawn_by(decoder: Decoder, members: int) -> torch.Tensor:
    decoder.draw()
    return decoder.drawn[torch.arange(members), decoder.count[:members] - 1]


@pytest.mark.parametrize("kept", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("block, codes", [((2, 4), 64), ((1, 1), 513), ((1, 2), 100)])
def test_blocks_are_those_of_torch(
    built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], codes: int, kept: str
) -> None:
    members, rows, found = 40, 53, []
    for natively in (True, False):
        with monkeypatch.context() as patched:
            if not natively:
                patched.setattr(native, "library", lambda: None)
            decoder = decoder_of(block, codes, members, rows)
            narrow(decoder.model, kept)
            decoder = again(decoder)
            state, expected_count = decoder.state.clone(), decoder.count + 1
            found.append(drawn_by(decoder, members))
            assert torch.equal(decoder.state, state) and torch.equal(decoder.count, expected_count)
            assert decoder.fine.all() and (decoder._native is not None) == natively
    ours, torchs = found
    inner = decoder.inner[torch.arange(members), decoder.count - 1]
    assert ((ours == codes) == ~inner).all()
    # rounding may move an edge, and what follows in the block
    assert (ours == torchs).all(1).float().mean() > 0.95 and int(ours.min()) >= 0 and int(ours.max()) <= codes


def narrow(model: ArTransformer, kept: str) -> None:
    """Weights that fewer bytes say."""
    if kept == "int8":
        quantise(model)
        return
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.copy_(linear.weight.to(getattr(torch, kept)))


def again(decoder: Decoder) -> Decoder:
    """The same state with the model's weights as they are now."""
    made = Decoder(decoder.model, decoder.positions, len(decoder.count))
    made.arrange(decoder.layout)
    for new, old in zip((*made.of_members(), made.state), (*decoder.of_members(), decoder.state), strict=True):
        new.copy_(old)
    return made


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_a_block_is_the_same_whatever_is_beside_it_and_for_any_number_of_threads(
    built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, block: tuple[int, int]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(native, "threads", lambda *_: torch.get_num_threads())  # however little there is to do
    expected = drawn_by(decoder_of(block, 100, 6, 12), 6)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(drawn_by(decoder_of(block, 100, 6, 12), 6), expected)
            for member in range(6):
                decoder = decoder_of(block, 100, 6, 12)
                decoder.state[:2] = decoder.state[[member, 6 + member]].clone()
                for buffer in decoder.of_members():
                    buffer[0] = buffer[member].clone()
                decoder.arrange(Layout([0, 0], [0], [1], [decoder.layout.options[member]]))
                assert torch.equal(drawn_by(decoder, 1)[0], expected[member])
    finally:
        torch.set_num_threads(threads)


def test_whoever_has_logits_that_are_no_numbers_is_told(built: ctypes.CDLL) -> None:
    decoder = decoder_of((2, 2), 64, 4, 8)
    decoder.state[2], decoder.state[4 + 1, 5] = torch.nan, torch.inf
    found = drawn_by(decoder, 4)
    assert decoder.fine.tolist() == [True, False, False, True] and ((found >= 0) & (found <= 64)).all()


def test_without_a_compiler_torch_goes_on_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    native.library.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(native, "_COMMAND", ("no-such-compiler",))
            assert native.library() is None and "it takes g++" in caplog.text
            assert Products(torch.zeros(8, 8)).native is None
        native.library.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(native, "_COMMAND", ("g++", "--no-such-option"))
            assert native.library() is None
    finally:
        native.library.cache_clear()


def test_it_is_built_once(built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = native._built(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    assert native._built(tmp_path) == path and list(tmp_path.iterdir()) == [path]
