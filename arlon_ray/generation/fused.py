"""The AR's step on a GPU through Triton's `kernels`, where they run and give what plain operations give."""

from __future__ import annotations

from logging import getLogger

import torch
from torch import Tensor, nn

from arlon_ray.generation.trunk import Attention, AttentionByIndex
from arlon_ray.models.ar import ArBlock, ArTransformer
from arlon_ray.models.layers import RMSNorm
from arlon_ray.models.quantised import Int8Linear

#: Of the largest number that comes out, how far the two may be apart: bfloat16 has 8 bits.
_TOLERANCE = 0.1


class _Scale:
    """A norm's weight and ε as the kernels have them: x · rsqrt(Σx² + ε·C) · (√C · weight)."""

    def __init__(self, *norms: RMSNorm) -> None:
        channels = norms[0].weight.shape[-1]
        self.weight = torch.cat([norm.weight.detach() for norm in norms]).float() * channels**0.5
        self.eps = norms[0].eps * channels


class _Layer:
    def __init__(self, block: ArBlock) -> None:
        self.heads, self.of_heads = block.heads, _Scale(block.q_norm, block.k_norm)
        self.before_attention, self.before_mlp = _Scale(block.attention_norm), _Scale(block.mlp_norm)
        linears = (block.qkv, block.proj, block.gate_up, block.down)
        self.qkv, self.proj, self.gate_up, self.down = (linear.weight.detach().contiguous() for linear in linears)


class FusedTrunk:
    """What `Trunk` computes, by index. Raises ImportError where there is no Triton."""

    def __init__(self, model: ArTransformer) -> None:
        from arlon_ray.generation import kernels  # not part of every installation

        self._kernels = kernels
        self._layers = [_Layer(block) for block in model.blocks]  # type: ignore[arg-type]
        self._norm = _Scale(model.norm)

    def __call__(self, x_RC: Tensor, turns: Tensor, at_R: Tensor, attention: Attention) -> Tensor:
        """See Trunk."""
        assert isinstance(attention, AttentionByIndex)
        product, seen = self._kernels.product, attention
        for layer, values in zip(self._layers, seen.values, strict=True):
            norm = layer.before_attention
            qkv = product(x_RC, layer.qkv, norm_C=norm.weight, eps=norm.eps)
            y = self._kernels.attend(
                qkv, layer.of_heads.weight, layer.of_heads.eps, turns, at_R, seen.filled, values[0], values[1],
                seen.visible, layer.heads, _parts(len(x_RC) * layer.heads, seen.count),
            )  # fmt: skip
            x_RC = product(y, layer.proj, x_RC)
            norm = layer.before_mlp
            y = product(x_RC, layer.gate_up, norm_C=norm.weight, eps=norm.eps, gated=True)
            x_RC = product(y, layer.down, x_RC)
        return x_RC

    def head(self, x_RC: Tensor, linear: nn.Linear) -> Tensor:
        """Logits behind the last norm."""
        return self._kernels.product(x_RC, linear.weight, norm_C=self._norm.weight, eps=self._norm.eps)


def _parts(programs: int, count: int) -> int:
    """How many programs share the positions of a row's head, so that all of a GPU has work."""
    if count <= 512 or programs >= 128:
        return 1
    return 4 if count <= 4096 else 16


def agrees(plain: Tensor, fused: Tensor) -> bool:
    """Whether the kernels give what plain operations give."""
    apart = (plain.float() - fused.float()).abs().max()
    if apart <= _TOLERANCE * plain.float().abs().max():
        return True
    getLogger(__name__).warning(
        "Triton's kernels are off by %.3g here, of numbers up to %.3g: the AR goes on without them, slower",
        float(apart), float(plain.abs().max()),
    )  # fmt: skip
    return False


def fused_trunk(model: ArTransformer) -> FusedTrunk | None:
    """None, said in the log, where there is no Triton, and for weights in 8 bits, which its kernels do not read."""
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        return None
    try:
        return FusedTrunk(model)
    except ImportError as error:
        getLogger(__name__).warning("no Triton (%s): the AR goes on without its own kernels, slower", error)
        return None
