"""Devices: what they can do by their data sheets, and how long stages were measured to take on them.

Two devices are measured (docs/scaling.md): one core of a CPU, and an H100. Another GPU is reckoned from the H100 by
the data sheets: products by the operations a second, the AR's decoding by the memory's bandwidth. A stage that was
never measured on a GPU is reckoned from the one that is most alike. Both are estimates, and are said to be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from arlon_ray.planning.counts import Work
from arlon_ray.planning.rates import Rate

GIB = 2**30
#: Stages and where their rates come from, if they were not measured: (stage, how many times as long).
LIKE = {
    # convolutions in TF32: half of the operations a second of bf16
    "vae_encode": ("dit", 2.0),
    "vae_decode": ("dit", 2.0),
    "codec": ("dit", 2.0),
    "text": ("dit", 1.0),
    "ar_context": ("dit", 1.0),
}
#: Of a training with float32 weights under autocast, as ours: so much longer than in bf16 alone (H100, compiled, 240p).
AUTOCAST = 1.13


@dataclass(frozen=True)
class Hardware:
    """A device. `peak`: dense bf16 operations a second (0: a CPU core), `bandwidth` of its memory and
    `link` to others of the same node in bytes a second, `memory` in bytes.

    `rates` are those of the stages that were measured on it, or on the one that it is `scaled_from`.
    """

    name: str
    peak: float
    bandwidth: float
    memory: float
    link: float
    hour_price: float
    rates: Mapping[str, Rate] = field(default_factory=dict)
    scaled_from: str = ""

    def seconds(self, stage: str, work: Work) -> float:
        """What `work` of a stage takes. Raises KeyError for a stage that there is not."""
        if stage.startswith("train") and self.peak:
            rate = self.rates["train_compiled" if stage.endswith("compiled") else "train"]
            return AUTOCAST * rate.seconds(Work(products=work.flops))
        if not self.peak and stage == "ar_context":
            stage = "ar"  # measured together
        like, times = (stage, 1.0) if stage in self.rates else LIKE[stage]
        # of a GPU's products and attention only the sum was measured
        alike = Work(products=work.flops) if self.peak and like == "dit" else work
        return times * self.rates[like].seconds(alike)

    def estimated(self, stage: str) -> bool:
        """Whether a stage's seconds are reckoned from another device or another stage."""
        if self.peak and stage == "train_dit":
            stage = "train"
        return bool(self.scaled_from) or stage not in self.rates


#: One core of an AMD EPYC (AVX2, float32): benchmarks/results/stages_cpu.json.
CPU = Hardware(
    "cpu", 0.0, 20e9, 4 * GIB, 10e9, 0.04,
    rates={
        "clip": Rate(9.799e-09, 0.0, 3.69e-09, 0.00658),
        "vae_encode": Rate(7.334e-12, 0.0, 5.783e-09, 7.784e-06),
        "text": Rate(0.0, 0.0, 8.301e-10, 0.0),
        "codec": Rate(8.082e-12, 0.0, 1.191e-09, 5.134e-05),
        "train_vae": Rate(1.07e-11, 0.0, 2.216e-09, 0.0002874),
        "train_codec": Rate(7.145e-12, 0.0, 2.814e-10, 4.576e-05),
        "train_ar": Rate(8.728e-12, 1.99e-11, 2.262e-09, 0.0),
        "train_dit": Rate(1.173e-11, 2.01e-11, 4.575e-10, 0.0004658),
        "ar": Rate(1.49e-11, 1.692e-11, 1.688e-10, 2.654e-05),
        "dit": Rate(1.057e-11, 1.123e-11, 1.403e-09, 0.0003576),
        "vae_decode": Rate(8.667e-12, 0.0, 4.305e-09, 4.42e-05),
        "mp4": Rate(0.0003695, 0.0, 9.106e-09, 0.0),
    },
)  # fmt: skip
#: An H100 SXM 80 GB, bf16: benchmarks/results/stages_h100.json.
H100 = Hardware(
    "h100", 989e12, 3.35e12, 80e9, 450e9, 2.5,
    rates={
        "ar": Rate(3.004e-13, 4.379e-12, 1.131e-13, 2.63e-05),
        "dit": Rate(4.029e-15, 0.0, 0.0, 0.0),
        "train": Rate(7.01e-15, 0.0, 0.0, 0.0),
        "train_compiled": Rate(3.155e-15, 0.0, 0.0, 0.0),
    },
)  # fmt: skip


def scaled(name: str, peak: float, bandwidth: float, memory: float, link: float, hour_price: float) -> Hardware:
    """Another GPU, from its data sheet: an estimate."""
    slower, narrower = H100.peak / peak, H100.bandwidth / bandwidth
    rates = {
        stage: Rate(rate.product_s * slower, rate.attention_s * slower, rate.traffic_s * narrower, rate.call_s)
        if stage == "ar"
        else Rate(rate.product_s * slower)
        for stage, rate in H100.rates.items()
    }
    return Hardware(name, peak, bandwidth, memory, link, hour_price, rates, scaled_from="h100")


#: Data sheets: dense bf16 operations a second, bytes a second, bytes, bytes a second in one direction; and dollars an
#: hour, which are only examples.
GPUS = {
    "h100": H100,
    "h200": scaled("h200", 989e12, 4.8e12, 141e9, 450e9, 3.5),
    "b200": scaled("b200", 2250e12, 8.0e12, 180e9, 900e9, 5.0),
    "a100": scaled("a100", 312e12, 2.0e12, 80e9, 300e9, 1.6),
    "l40s": scaled("l40s", 362e12, 0.864e12, 48e9, 32e9, 1.1),
    "l4": scaled("l4", 121e12, 0.3e12, 24e9, 32e9, 0.6),
}


def with_rates(hardware: Hardware, file: str | Path) -> Hardware:
    """`hardware` with the rates that `benchmarks.stages` wrote to `file`. Raises ValueError for another file."""
    try:
        stages = json.loads(Path(file).read_text())["stages"]
        rates = {stage: Rate(**its["rate"]) for stage, its in stages.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: no rates as benchmarks.stages writes them: {error!r}") from None
    return replace(hardware, rates={**hardware.rates, **rates}, scaled_from="")
