"""bf16 on a CPU that only emulates it: float32 instead, and said."""

from __future__ import annotations

import contextlib

import pytest
import torch

from arlon_ray import precision
from arlon_ray.config import TrainingConfig, load_config
from arlon_ray.models.text import load_text_encoder
from arlon_ray.training.engine import autocast

CPU = torch.device("cpu")


@pytest.mark.parametrize("has", [True, False])
def test_bf16_is_used_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: has)
    assert precision.arithmetic("bf16", CPU) is (torch.bfloat16 if has else torch.float32)
    assert precision.falls_back("bf16", CPU) is not has
    context = autocast(TrainingConfig(precision="bf16"), CPU)
    assert isinstance(context, contextlib.nullcontext) is not has
    with context:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is (torch.bfloat16 if has else torch.float32)


def test_what_was_asked_for_is_used_everywhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    assert precision.arithmetic("bf16", "cuda") is torch.bfloat16
    assert precision.arithmetic("fp32", CPU) is torch.float32 and not precision.falls_back("fp32", CPU)


def test_the_cpu_s_own_answer_is_one() -> None:
    assert precision._cpu_has_bf16() in (True, False)


def test_a_text_encoder_in_bf16_computes_in_float32_where_the_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    encoder = load_text_encoder(load_config("tiny", ["text.precision=bf16"]).text)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
