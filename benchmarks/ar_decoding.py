"""AR decoding against `transformers`: `LlamaForCausalLM.generate` with its static cache; neither Ray nor data.

    python -m benchmarks.ar_decoding --device cpu --sizes tiny small --batch 1 8 --tokens 1024 --output FILE

The peer has our width, layers, heads, MLP, codes, dtype and even our weights, a prompt as long as our text, and draws
as we do (temperature, top-p), as many tokens. On a GPU it is measured as it compiles itself, and without that. Works of
a case take turns, and so does the measure of the memory's speed: what a step reads at least, over that, is the limit.
Ours: one token a step (block 1×1), with guidance (two rows a video), and with several tokens a step; on a CPU also with
weights rounded to bfloat16, as they are with `precision: bf16` (the peer in bfloat16 beside it), and to 8 bits. What
fails is told as an error, and the rest runs; a case that would begin after `--seconds` is left out and named.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from arlon_ray.config import ArConfig, SamplingConfig
from arlon_ray.generation.sampling import Sampling, SamplingBatch
from arlon_ray.models.ar import ArTransformer
from arlon_ray.models.quantised import quantise
from arlon_ray.precision import falls_back
from benchmarks.machine import device_or_exit, in_turns, machine, synchronised

#: name: (settings of the AR, codes). The first three are the presets'.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": ({"dim": 192, "layers": 4, "heads": 4}, 512),
    "small": ({"dim": 640, "layers": 12, "heads": 10}, 2048),
    "large": ({"dim": 1280, "layers": 36, "heads": 20}, 8192),
    "1b": ({"dim": 2048, "layers": 16, "heads": 16, "mlp_ratio": 4.0}, 8192),
}
#: Width of the token grid and its height; whole frames of it are drawn.
SIDE = 8
TEXT_TOKENS, TEXT_DIM = 32, 384
BLOCKS = {"2×4 a step": (2, 4), "a row a step": (1, SIDE)}
PEER = "transformers"
PEERS = {"compiled": f"{PEER}, compiled", "eager": PEER}
PLAIN = "ours, torch's kernels"
#: On a CPU, where they are computed with in float32.
ROUNDED = {"bf16": "ours, weights in bf16", "int8": "ours, weights in int8"}


def build(size: str, block: tuple[int, int], device: str, dtype: torch.dtype, like: ArTransformer | None) -> Any:
    """An AR of random weights; those of the transformer itself are `like`'s, where there is one."""
    settings, codes = SIZES[size]
    with torch.device("meta"):
        model = ArTransformer(
            ArConfig(**settings, block=block), codebook_size=codes, text_dim=TEXT_DIM, max_text=TEXT_TOKENS
        )
    if like is not None:
        model.blocks = like.blocks
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, device=device, dtype=dtype)
                setattr(module, name, nn.Parameter(_filled(name, value, generator), requires_grad=False))
    return model.eval().requires_grad_(False)


def _filled(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Weights as small as those that training starts with, and norms near one."""
    value.uniform_(-0.035, 0.035, generator=generator)
    return value.add_(1) if value.ndim == 1 and name == "weight" else value


def rounded(model: ArTransformer, kind: str) -> ArTransformer:
    """The same with its weights in fewer bits, as a bundle has it on a CPU."""
    model = copy.deepcopy(model)
    return model.bfloat16().float() if kind == "bf16" else cast(ArTransformer, quantise(model))


def build_peer(model: ArTransformer, positions: int) -> Any:
    """`LlamaForCausalLM` of the AR's own weights, as views."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    logging.getLogger("transformers").setLevel(logging.ERROR)
    first: Any = model.blocks[0]
    config = LlamaConfig(
        vocab_size=model.codebook_size, hidden_size=model.config.dim, num_hidden_layers=model.config.layers,
        intermediate_size=first.down.in_features, num_attention_heads=model.config.heads,
        num_key_value_heads=model.config.heads, max_position_embeddings=positions, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    weights = {"model.embed_tokens.weight": model.codes.weight, "model.norm.weight": model.norm.weight}
    weights["lm_head.weight"] = model.head.weight
    block: Any
    for number, block in enumerate(model.blocks):
        q, k, v = block.qkv.weight.chunk(3)
        gate, up = block.gate_up.weight.chunk(2)
        parts = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": block.proj.weight,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block.down.weight,
            "input_layernorm": block.attention_norm.weight, "post_attention_layernorm": block.mlp_norm.weight,
        }  # fmt: skip
        weights |= {f"model.layers.{number}.{name}.weight": value for name, value in parts.items()}
    with torch.device("meta"):
        peer = LlamaForCausalLM(config)
    peer.load_state_dict(weights, assign=True)
    with model.head.weight.device:
        peer.model.rotary_emb = LlamaRotaryEmbedding(config)
    return peer.eval().requires_grad_(False)


def peer_work(peer: Any, batch: int, tokens: int, sampling: SamplingConfig, compiled: bool) -> Callable[[], Any]:
    """Draws so many tokens of each of `batch` sequences."""
    device = next(peer.parameters()).device
    ids = torch.randint(peer.config.vocab_size, (batch, TEXT_TOKENS), device=device)

    def run() -> Any:
        return peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True,
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, cache_implementation="static",
            disable_compile=not compiled,
        )  # fmt: skip

    return run


def our_work(
    model: ArTransformer, batch: int, tokens: int, sampling: SamplingConfig, fused: bool | None = None
) -> Callable[[], Any]:
    """The same, as the planner does it (`fused`: see `Decoder`)."""
    grid = (tokens // SIDE**2, SIDE, SIDE)
    t, h, w = model.block_grid(grid)
    device, dtype = model.head.weight.device, model.head.weight.dtype
    text = torch.randn(1, TEXT_TOKENS, TEXT_DIM, device=device, dtype=dtype)
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=device)
    shared = SamplingBatch(model, TEXT_TOKENS + t * h * w, batch, fused=fused)

    def run() -> list[Tensor]:
        members = []
        for seed in range(batch):
            context = torch.zeros(0, *grid[1:], dtype=torch.long, device=device)
            generator = torch.Generator(device).manual_seed(seed)
            members.append(Sampling((text, mask), context, grid, sampling, generator))
            shared.join(members[-1])
        while shared.members:
            shared.step()
        return [member.result for member in members]

    return run


def memory_works(device: str) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Bytes that are moved, and the work: a copy, and a product that reads far more than caches hold."""
    rows = 2**18 if device == "cuda" else 2**15
    matrix = torch.ones(rows, 4096, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    vector, target = torch.ones_like(matrix[0]), torch.empty_like(matrix)
    size = matrix.numel() * matrix.element_size()
    return {"memory: copy": (2 * size, lambda: target.copy_(matrix)), "memory: read": (size, lambda: matrix @ vector)}


def weight_bytes(model: ArTransformer, kind: str | None = None) -> int:
    """What one step with one token must read of the weights, as they are or `rounded`."""
    blocks = sum(weight.numel() * weight.element_size() for weight in model.blocks.parameters())
    rest = sum(weight.numel() * weight.element_size() for weight in (model.head.weight, model.norm.weight))
    if kind == "bf16":
        return (blocks + rest) // 2
    return blocks // 4 + rest if kind == "int8" else blocks + rest


class Case:
    """One size and batch: builds the works, tries each of them once, and lets those that run take turns."""

    def __init__(self, size: str, batch: int, tokens: int, arguments: argparse.Namespace) -> None:
        self.size, self.batch, self.tokens, self.device = size, batch, tokens, arguments.device
        self.runs, self.peers, self.only = arguments.runs, arguments.peers, arguments.works
        self.works: dict[str, Callable[[], Any]] = {}
        self.result: dict[str, Any] = {"size": size, "batch": batch, "tokens": tokens, "works": {}}

    def measure(self, models: dict[str, Any]) -> dict[str, Any]:
        """Tokens a second of each work, and how they compare with the peer."""
        self._take_in(models)
        # what the others are compared with comes first
        self.works = dict(sorted(self.works.items(), key=lambda item: not item[0].startswith(PEER)))
        memory = memory_works(self.device) if self.batch == 1 else {}
        for name, (_, work) in memory.items():
            self.works[name] = synchronised(work, self.device)
        found = in_turns(self.works, self.runs)
        for name, seconds in found.items():
            if name not in memory:
                rate = self.batch * self.tokens / seconds["median"]
                self.result["works"][name] = {"tokens_per_s": rate, "seconds": seconds}
        if memory:
            self._add_limit(models["ours"], {name: size / found[name]["median"] for name, (size, _) in memory.items()})
        return self.result

    def _take_in(self, models: dict[str, Any]) -> None:
        plain = SamplingConfig(ar_guidance_scale=1.0)
        makers: dict[str, Callable[[], Callable[[], Any]]] = {}
        makers["ours"] = lambda: our_work(models["ours"], self.batch, self.tokens, plain)
        if self.device == "cuda":
            makers[PLAIN] = partial(our_work, models["ours"], self.batch, self.tokens, plain, False)
        guided = SamplingConfig(ar_guidance_scale=1.5)
        makers["ours, guided"] = lambda: our_work(models["ours"], self.batch, self.tokens, guided)
        if self.device == "cpu":
            for kind, name in ROUNDED.items():
                makers[name] = partial(self._rounded, models["ours"], kind, plain)
        for name in BLOCKS:
            makers[f"ours, {name}"] = partial(our_work, models[name], self.batch, self.tokens, plain)
        if find_spec("transformers") is None:
            self.result["works"][PEER] = {"error": "absent: transformers is not installed"}
        else:
            peer = build_peer(models["ours"], TEXT_TOKENS + self.tokens)
            for kind in self.peers if self.device == "cuda" else ("eager",):
                makers[PEERS[kind]] = partial(peer_work, peer, self.batch, self.tokens, plain, kind == "compiled")
            if self.device == "cpu" and not falls_back("bf16", "cpu"):
                makers[f"{PEER}, bf16"] = partial(self._half_peer, models["ours"], plain)
        for name, make in makers.items():
            if self.only and name not in self.only:
                continue
            try:
                work = synchronised(make(), self.device)
                seconds = []
                for _ in range(2 if self.device == "cuda" else 1):
                    begin = time.perf_counter()
                    work()
                    seconds.append(f"{time.perf_counter() - begin:.2f} s")
                print(f"  {name}: first {', then '.join(seconds)}", file=sys.stderr, flush=True)
                self.works[name] = work
            except Exception as error:
                self.result["works"][name] = {"error": f"{type(error).__name__}: {error}"[:500]}

    def _half_peer(self, model: ArTransformer, sampling: SamplingConfig) -> Callable[[], Any]:
        peer = build_peer(copy.deepcopy(model).bfloat16(), TEXT_TOKENS + self.tokens)
        return peer_work(peer, self.batch, self.tokens, sampling, False)

    def _rounded(self, model: ArTransformer, kind: str, sampling: SamplingConfig) -> Callable[[], Any]:
        return our_work(rounded(model, kind), self.batch, self.tokens, sampling)

    def _add_limit(self, model: ArTransformer, speeds: dict[str, float]) -> None:
        """The share of the memory's measured speed at which the weights are read, one row of the batch a step."""
        size, best = weight_bytes(model), max(speeds.values())
        self.result |= {"bytes_per_s": speeds, "weight_bytes": size, "limit_tokens_per_s": best / size}
        sizes = dict.fromkeys(("ours", PLAIN, *PEERS.values()), size)
        sizes |= {name: weight_bytes(model, kind) for kind, name in ROUNDED.items()}
        for name, its in sizes.items():
            work = self.result["works"].get(name, {})
            if "tokens_per_s" in work:
                work["share_of_limit"] = work["tokens_per_s"] * its / best


def table(cases: list[dict[str, Any]]) -> str:
    """What was found, for people."""
    lines = [f"{'size':6} {'batch':>5} {'work':26} {'tokens/s':>10} {'× peer':>7} {'from–to':>12} {'of limit':>8}"]
    for case in cases:
        for name, work in case.get("works", {"": case}).items():
            begin = f"{case['size']:6} {case['batch']:5} {name:26} "
            if "error" in work:
                lines.append(begin + work["error"].splitlines()[0])
                continue
            seconds, share = work["seconds"], work.get("share_of_limit")
            spread = f"{seconds['from']:.2f}–{seconds['to']:.2f}"
            end = "" if share is None else f"{share:8.0%}"
            lines.append(f"{begin}{work['tokens_per_s']:10.1f} {seconds['times_as_fast']:7.2f} {spread:>12} {end}")
    return "\n".join(lines)


def run_cases(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for; the file is written after every case."""
    begin, dtype = time.perf_counter(), torch.bfloat16 if arguments.device == "cuda" else torch.float32
    result: dict[str, Any] = {"machine": machine(), "device": arguments.device, "dtype": str(dtype), "cases": []}
    for size in arguments.sizes:
        models: dict[str, Any] = {}
        for batch in arguments.batch:
            tokens = arguments.tokens_1b if size == "1b" and arguments.tokens_1b else arguments.tokens
            case = {"size": size, "batch": batch, "tokens": tokens}
            if time.perf_counter() - begin > arguments.seconds:
                case["error"] = f"not measured: {arguments.seconds:.0f} s were over"
            else:
                print(f"{size}, batch {batch}", file=sys.stderr, flush=True)
                try:
                    if not models:
                        models["ours"] = build(size, (1, 1), arguments.device, dtype, None)
                        for name, block in BLOCKS.items():
                            models[name] = build(size, block, arguments.device, dtype, models["ours"])
                    case = Case(size, batch, tokens, arguments).measure(models)
                except Exception as error:
                    case["error"] = f"{type(error).__name__}: {error}"[:500]
            result["cases"].append(case)
            if arguments.output:
                Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
        del models
    return result


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    flags.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "small"])
    flags.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    flags.add_argument("--tokens", type=int, default=1024, help=f"of a sequence; a multiple of {SIDE**2}")
    flags.add_argument("--tokens-1b", type=int, help="of a sequence at size 1b, where each takes long on a CPU")
    flags.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), help="on a GPU")
    flags.add_argument("--works", nargs="+", metavar="NAME", help="of those in the table (default: all)")
    flags.add_argument("--runs", type=int, default=3)
    flags.add_argument("--seconds", type=float, default=900, help="no case begins later than this")
    flags.add_argument("--output", metavar="FILE", help="write the JSON there, after every case")
    arguments = flags.parse_args()
    device_or_exit(arguments.device)
    if any((count or SIDE**2) % SIDE**2 or count == 0 for count in (arguments.tokens, arguments.tokens_1b)):
        flags.error(f"--tokens: expected multiples of {SIDE**2}, whole frames of tokens")
    print(table(run_cases(arguments)["cases"]))


if __name__ == "__main__":
    main()
