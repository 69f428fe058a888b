"""Open-Sora v1.2's STDiT3 as its public formulas have it, step by step: what our DiT is measured against.

The same weights, no shortcut: attention as its non-flash path (softmax(q·kᵀ/√d) written out, in float32), the text's
keys and values, the adapter's features and each layer's modulation made anew at every step, both branches of the
guidance as one batch of two. As in the public code, padding is cut off the text, and the table of positions is kept.
ARLON's injection (g·((1 + s)·Norm(x) + b)) is written in the same way.

Legend: B batch, C latent channels, t×h×w latent grid, T×S tokens, D hidden size, L text tokens, A heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from arlon_ray.models.dit import STDiT3, STDiT3Block
from arlon_ray.models.injection import GatedAdaptiveNorm
from arlon_ray.models.layers import CrossAttention, RMSNorm, ScalarEmbedder, SelfAttention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The non-flash path of Open-Sora's `Attention.forward`."""
    dtype = q.dtype
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.to(torch.float32).softmax(dim=-1).to(dtype) @ v


def rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """LlamaRMSNorm."""
    wide = x.to(torch.float32)
    return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def rotated(x_BAND: Tensor, freqs: Tensor) -> Tensor:
    """rotary_embedding_torch's `rotate_queries_or_keys`."""
    angles = torch.arange(x_BAND.shape[-2], device=x_BAND.device).float()[:, None] * freqs.float()
    angles = torch.repeat_interleave(angles, 2, dim=-1)
    first, second = rearrange(x_BAND, "... (d r) -> ... d r", r=2).unbind(-1)
    half = rearrange(torch.stack((-second, first), dim=-1), "... d r -> ... (d r)")
    return x_BAND * angles.cos().to(x_BAND.dtype) + half * angles.sin().to(x_BAND.dtype)


def self_attention(
    layer: SelfAttention, attention: Attention, x_BNC: Tensor, freqs: Tensor | None, places: int = 1
) -> Tensor:
    """Queries, keys, values, norms, positions (each holds for `places` neighbouring tokens), attention, projection."""
    batch, count, dim = x_BNC.shape
    qkv = layer.qkv(x_BNC).view(batch, count, 3, layer.heads, dim // layer.heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    if isinstance(layer.q_norm, RMSNorm) and isinstance(layer.k_norm, RMSNorm):
        q, k = rms_norm(layer.q_norm, q), rms_norm(layer.k_norm, k)
    if freqs is not None:
        q, k = (
            rotated(part.unflatten(2, (-1, places)).transpose(2, 3), freqs).transpose(2, 3).flatten(2, 3)
            for part in (q, k)
        )
    return layer.proj(attention(q, k, v).transpose(1, 2).reshape(batch, count, dim))


def cross_attention(layer: CrossAttention, attention: Attention, x_BNC: Tensor, text_BLC: Tensor) -> Tensor:
    """Keys and values of the text are made here, at every step of every layer."""
    q = rearrange(layer.q_linear(x_BNC), "b n (a d) -> b a n d", a=layer.heads)
    k, v = rearrange(layer.kv_linear(text_BLC), "b l (two a d) -> two b a l d", two=2, a=layer.heads)
    return layer.proj(rearrange(attention(q, k, v), "b a n d -> b n (a d)"))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """t2i_modulate of a norm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def chosen(noisy_BT: Tensor | None, noisy: Tensor, clean: Tensor) -> Tensor:
    """`t_mask_select`: frames that carry no noise take what was made for time 0."""
    return noisy if noisy_BT is None else torch.where(noisy_BT[:, :, None, None], noisy, clean)


def block(
    layer: STDiT3Block,
    attention: Attention,
    x_BTSD: Tensor,
    text: Tensor,
    t: Tensor,
    t0: Tensor,
    noisy_BT: Tensor | None,
    freqs: Tensor,
) -> Tensor:
    """STDiT3Block.forward, conditioning frames modulated apart and then chosen, as `x_mask` does."""
    batch, frames, places, _ = x_BTSD.shape

    def parts(time: Tensor) -> list[Tensor]:
        return [part[:, :, None] for part in (layer.scale_shift_table[None] + time.view(batch, 6, -1)).chunk(6, dim=1)]

    shift1, scale1, gate1, shift2, scale2, gate2 = parts(t)
    clean = parts(t0)
    y = chosen(noisy_BT, modulated(x_BTSD, shift1, scale1), modulated(x_BTSD, clean[0], clean[1]))
    if layer.joint:
        y = self_attention(layer.attn, attention, rearrange(y, "b t s d -> b (t s) d"), freqs, places)
        y = rearrange(y, "b (t s) d -> b t s d", t=frames)
    elif layer.temporal:
        y = self_attention(layer.attn, attention, rearrange(y, "b t s d -> (b s) t d"), freqs)
        y = rearrange(y, "(b s) t d -> b t s d", b=batch)
    else:
        y = self_attention(layer.attn, attention, rearrange(y, "b t s d -> (b t) s d"), None)
        y = rearrange(y, "(b t) s d -> b t s d", b=batch)
    x = x_BTSD + chosen(noisy_BT, gate1 * y, clean[2] * y)
    x = x + cross_attention(layer.cross_attn, attention, x.flatten(1, 2), text).view_as(x)
    y = chosen(noisy_BT, modulated(x, shift2, scale2), modulated(x, clean[3], clean[4]))
    y = layer.mlp.fc2(F.gelu(layer.mlp.fc1(y), approximate="tanh"))
    return x + chosen(noisy_BT, gate2 * y, clean[5] * y)


@lru_cache(maxsize=512)
def positions(height: int, width: int, dim: int, scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """PositionEmbedding2D [h·w, D], kept between steps as the public code keeps it."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, dim // 2, 2, device=device).float() / (dim // 2))
    base = round(math.sqrt(height * width))
    rows = torch.arange(height, device=device).float() / scale * (base / height)
    columns = torch.arange(width, device=device).float() / scale * (base / width)
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
    angles = grid.flatten(1)[:, :, None] * frequencies
    return torch.cat([part for axis in angles for part in (axis.sin(), axis.cos())], dim=-1).to(dtype)


def time_embedding(embedder: ScalarEmbedder, values_B: Tensor) -> Tensor:
    """TimestepEmbedder and SizeEmbedder."""
    half = embedder.frequencies // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=values_B.device).float() / half)
    angles = values_B[:, None].float() * frequencies[None]
    weight = next(embedder.mlp.parameters())
    return embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight.dtype))


def injected(dit: STDiT3, number: int, x_BTSD: Tensor, coarse_BCthw: Tensor) -> Tensor:
    """ARLON's gated adaptive norm of one layer, its features made from the coarse latent."""
    injection = dit.injection
    assert injection is not None
    if str(number) not in injection.layers:
        return x_BTSD
    layer, features = injection.layers[str(number)], injection.adapter(coarse_BCthw)
    assert isinstance(layer, GatedAdaptiveNorm), "written out for this kind of injection alone"
    gate, scale, bias = layer.out(F.silu(layer.hidden(features))).chunk(3, dim=-1)
    x = x_BTSD.flatten(1, 2)
    return (x + gate * ((1.0 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + bias)).view_as(x_BTSD)


def forward(
    dit: STDiT3,
    x_BCthw: Tensor,
    time_B: Tensor,
    text_BLE: Tensor,
    mask_BL: Tensor,
    fps_B: Tensor,
    size: tuple[int, int],
    noisy_Bt: Tensor | None = None,
    coarse_BCthw: Tensor | None = None,
    attention: Attention = naive_attention,
) -> Tensor:
    """STDiT3.forward: [B, C or 2C, t, h, w] in float32. All texts have the same number of real tokens (`mask`)."""
    config, dtype = dit.config, dit.final_layer.linear.weight.dtype
    pt, ph, pw = config.patch_size
    frames, height, width = x_BCthw.shape[2:]
    x = x_BCthw.to(dtype)
    coarse = None if coarse_BCthw is None else coarse_BCthw.to(dtype)
    padding = (0, -width % pw, 0, -height % ph, 0, -frames % pt)
    rows, columns = -(-height // ph), -(-width // pw)
    scale = math.sqrt(size[0] * size[1]) / config.input_sq_size
    fps = time_embedding(dit.fps_embedder, fps_B)
    t_D, t0_D = (time_embedding(dit.t_embedder, time) + fps for time in (time_B, torch.zeros_like(time_B)))
    t, t0 = dit.t_block(t_D), dit.t_block(t0_D)
    text = dit.y_embedder.y_proj(text_BLE.to(dtype))
    text = text.masked_select(mask_BL[:, :, None]).view(len(text), -1, text.shape[-1])
    x = rearrange(dit.x_embedder.proj(F.pad(x, padding)), "b d t h w -> b t (h w) d")
    x = x + positions(rows, columns, config.hidden_size, scale, x.device, dtype)
    noisy_BT = None if noisy_Bt is None else noisy_Bt[:, ::pt]
    for number, pair in enumerate(zip(dit.spatial_blocks, dit.temporal_blocks, strict=True)):
        if coarse is not None:
            x = injected(dit, number, x, coarse)
        for layer in pair:
            x = block(layer, attention, x, text, t, t0, noisy_BT, dit.rope.freqs)  # type: ignore[arg-type]
    final = dit.final_layer

    def last(x: Tensor, time_BD: Tensor) -> Tensor:
        shift, scale = (final.scale_shift_table[None] + time_BD[:, None]).chunk(2, dim=1)
        return modulated(x, shift[:, :, None], scale[:, :, None])

    modulated_x = last(x, t_D)
    x = final.linear(modulated_x if noisy_BT is None else chosen(noisy_BT, modulated_x, last(modulated_x, t0_D)))
    out = rearrange(x, "b t (h w) (u p q c) -> b c (t u) (h p) (w q)", h=rows, w=columns, u=pt, p=ph, q=pw)
    return out[:, :, :frames, :height, :width].float()


@torch.no_grad()
def guided_step(
    dit: STDiT3,
    x_1Cthw: Tensor,
    time_1: Tensor,
    text: tuple[Tensor, Tensor],
    fps: float,
    size: tuple[int, int],
    guidance_scale: float,
    noisy_1t: Tensor | None = None,
    coarse_1Cthw: Tensor | None = None,
    attention: Attention = naive_attention,
) -> Tensor:
    """The velocity [1, C, t, h, w] under text guidance: v(null) + s·(v(text) − v(null)), the two as one batch."""
    values, mask = text
    null = dit.y_embedder.y_embedding[None, : values.shape[1]].to(values.dtype)
    output = forward(
        dit,
        torch.cat([x_1Cthw, x_1Cthw]),
        torch.cat([time_1, time_1]),
        torch.cat([values, null]),
        torch.cat([mask, mask]),
        torch.full((2,), fps, device=x_1Cthw.device),
        size,
        None if noisy_1t is None else torch.cat([noisy_1t, noisy_1t]),
        None if coarse_1Cthw is None else torch.cat([coarse_1Cthw, coarse_1Cthw]),
        attention,
    )
    with_text, without = output.chunk(2, dim=1)[0].chunk(2) if dit.config.pred_sigma else output.chunk(2)
    return without + guidance_scale * (with_text - without)
