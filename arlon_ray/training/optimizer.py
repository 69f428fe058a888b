"""Learning rates, parameter groups, Muon, and the moving average of the weights. The same for every engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arlon_ray.config import TrainingConfig
from arlon_ray.training.state import Piece

MUON_MOMENTUM = 0.95
ADAM_EPSILON = 1e-8
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
#: Where the rounding errors of the iteration on X·Xᵀ are cleared by going back to X itself.
GRAM_RESTART = 2


def learning_rate_scale(step: int, training: TrainingConfig) -> float:
    """Factor on the learning rate of `step` (0-based): a linear warm-up, then constant, linear or cosine to zero."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps))
    return 1.0 - progress if training.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(objective: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups with their own settings, each tagged with `use_muon` for the engines.

    Muon takes weights of two and more dimensions (convolutions as [out, rest]), except embeddings and what a module
    names by prefix in `muon_excluded` (input and output layers, tables). AdamW takes the rest; it decays matrices only.
    """
    excluded = _excluded_prefixes(objective)
    muon: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in objective.named_parameters():
        matrix = parameter.ndim >= 2
        use_muon = training.optimizer == "muon" and matrix and not name.startswith(excluded)
        parameter.use_muon = use_muon  # type: ignore[attr-defined]
        if parameter.requires_grad:
            (muon if use_muon else decayed if matrix else plain).append(parameter)
    decay = training.weight_decay
    adamw = {"use_muon": False, "lr": training.learning_rate, "betas": training.betas, "eps": ADAM_EPSILON}
    momentum = {"use_muon": True, "lr": training.muon_learning_rate, "momentum": MUON_MOMENTUM}
    groups = [
        {"params": muon, "weight_decay": decay, **momentum},
        {"params": decayed, "weight_decay": decay, **adamw},
        {"params": plain, "weight_decay": 0.0, **adamw},
    ]
    for group in groups:
        group["base_lr"] = group["lr"]
    return [group for group in groups if group["params"]]


def _excluded_prefixes(objective: nn.Module) -> tuple[str, ...]:
    prefixes = []
    for path, module in objective.named_modules():
        start = f"{path}." if path else ""
        prefixes += [f"{start}{name}" for name in getattr(module, "muon_excluded", ())]
        if isinstance(module, nn.Embedding):
            prefixes.append(f"{start}weight")
    return tuple(prefixes)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix [..., n, m] with its singular values brought near 1 (Muon's quintic Newton-Schulz iteration).

    Iterates on the small square X·Xᵀ, as DeepSpeed's "gram" method does: 2.5 times fewer operations on wide
    convolution weights. Half precision on CUDA, float32 elsewhere (also DeepSpeed's choice).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.mT if matrix.size(-2) > matrix.size(-1) else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.half() if x.is_cuda else x.float()
    if x.size(-2) == x.size(-1):
        for _ in range(NEWTON_SCHULZ_STEPS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
    else:
        x = _gram_iteration(x)
    return (x.mT if matrix.size(-2) > matrix.size(-1) else x).to(matrix.dtype)


def _gram_iteration(x: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    q = torch.eye(x.size(-2), dtype=x.dtype, device=x.device)
    for i in range(NEWTON_SCHULZ_STEPS):
        if i == GRAM_RESTART:
            x = q @ x
            gram = x @ x.mT
        z = b * gram + c * gram @ gram
        if i in (0, GRAM_RESTART):
            q = z.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = a * q + z @ q
        if i < NEWTON_SCHULZ_STEPS - 1 and i + 1 != GRAM_RESTART:
            product = a * gram + z @ gram
            gram = a * product + z @ product
    return q @ x


def muon_update(grad: Tensor, momentum: Tensor, beta: float = MUON_MOMENTUM, **_: Any) -> Tensor:
    """Muon's step for one weight, in the shape of `grad`; `momentum` is updated in place.

    Nesterov momentum, orthogonalised as [out, rest] and scaled by sqrt(max(1, out / rest)). The signature is that of
    DeepSpeed's function, which this one replaces there (see jobs/deepspeed_engine), so that both engines agree.
    """
    if not bool(torch.isfinite(grad).all()):
        return grad
    momentum.lerp_(grad, 1 - beta)
    update = grad.lerp(momentum, beta).flatten(1)
    rows, columns = update.shape
    return (orthogonalized(update) * math.sqrt(max(1.0, rows / columns))).view_as(grad)


def muon_updates(grads: Sequence[Tensor], momenta: Sequence[Tensor], beta: float = MUON_MOMENTUM) -> list[Tensor]:
    """`muon_update` of many weights: those of one shape together, and nothing waits for the device.

    For GPUs, where the small products of one weight cost their launches: ten times fewer of them.
    """
    torch._foreach_lerp_(list(momenta), list(grads), 1 - beta)
    ahead = torch._foreach_lerp(list(grads), list(momenta), beta)
    alike: dict[tuple[int, int], list[int]] = {}
    for number, each in enumerate(ahead):
        alike.setdefault((each.shape[0], each[0].numel()), []).append(number)
    updates = list(ahead)
    for (rows, columns), numbers in alike.items():
        stacked = orthogonalized(torch.stack([ahead[number].flatten(1) for number in numbers]))
        for number, update in zip(numbers, stacked * math.sqrt(max(1.0, rows / columns)), strict=True):
            updates[number] = update.view_as(ahead[number])
    return updates


class Muon(torch.optim.Optimizer):
    """Muon for one process. torch.optim.Muon takes matrices only; this one takes convolution weights as well."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.02, "weight_decay": 0.0, "momentum": MUON_MOMENTUM})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients that are there."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            if parameters and all(parameter.is_cuda for parameter in parameters):
                updates = muon_updates(gradients, momenta, group["momentum"])
            else:
                updates = [muon_update(g, m, group["momentum"]) for g, m in zip(gradients, momenta, strict=True)]
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])


def build_optimizers(groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
    """Plain optimizers for the groups of `parameter_groups`."""
    muon = [group for group in groups if group["use_muon"]]
    adamw = [group for group in groups if not group["use_muon"]]
    return [*([Muon(muon)] if muon else []), *([torch.optim.AdamW(adamw, fused=True)] if adamw else [])]


def set_learning_rates(param_groups: list[dict[str, Any]], scale: float) -> None:
    """Each group's rate becomes its base rate times `scale`."""
    for group in param_groups:
        group["lr"] = group["base_lr"] * scale


def clipped_parameters(objective: nn.Module) -> list[nn.Parameter]:
    """What gradient clipping looks at: AdamW's parameters. Muon's step has a fixed size whatever the gradient's is."""
    return [p for p in objective.parameters() if p.requires_grad and not getattr(p, "use_muon", False)]


class WeightAverage:
    """Exponential moving average of the pieces of parameters that this worker updates; buffers are used as they are.

    The decay of update s (from 0) is min(decay, (1 + s) / (10 + s)), so that the first steps are soon forgotten.
    """

    def __init__(self, parameters: Sequence[Piece], decay: float) -> None:
        self.decay = decay
        self._parameters = [piece.values for piece in parameters]
        self.pieces = [piece.under("average", piece.values.detach().clone()) for piece in parameters]
        self._average = [piece.values for piece in self.pieces]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after the optimizer's step number `step` (from 0)."""
        if self._average:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self._average, self._parameters, 1 - decay)
