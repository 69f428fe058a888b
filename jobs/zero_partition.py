"""What one worker holds of the parameters and of the optimizer's state under each stage of ZeRO, by names.

DeepSpeed's own checkpoints fit the number of workers and the stage that wrote them; these pieces fit any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from arlon_ray.training.engine import (
    OPTIMIZER_KEYS,
    load_whole,
    prepare_state,
    whole_optimizer_state,
    whole_parameters,
)
from arlon_ray.training.state import Piece, SavedState

MOMENTUM = OPTIMIZER_KEYS[True][0]


class Partition(Protocol):
    """One worker's part of a training's state. Pieces are views."""

    def parameters(self) -> list[Piece]:
        """Of the float32 parameters that train; all workers' together are all there is."""

    def kept(self) -> list[Piece]:
        """Of what the optimizer keeps, likewise."""

    def load(self, saved: SavedState) -> None:
        """Take over a saved state. Every worker calls it. Raises KeyError if it does not fit."""


def partition_of(optimizer: Any, objective: nn.Module, stage: int, rank: int) -> Partition:
    """The part of worker `rank`; `optimizer` is that of the engine that `deepspeed.initialize` made."""
    if not stage:
        return _Unpartitioned(optimizer, objective, rank)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    return (_Sharded if stage == 3 else _Flat)(optimizer, names, rank)


class _Unpartitioned:
    """Without ZeRO: every worker has all there is, and the first one saves it."""

    def __init__(self, optimizer: Any, objective: nn.Module, rank: int) -> None:
        self.optimizer, self.objective, self.rank = optimizer, objective, rank

    def parameters(self) -> list[Piece]:
        """See Partition."""
        return [] if self.rank else whole_parameters(self.objective)

    def kept(self) -> list[Piece]:
        """See Partition."""
        return [] if self.rank else whole_optimizer_state(self.objective, [self.optimizer])

    def load(self, saved: SavedState) -> None:
        """See Partition."""
        load_whole(saved, self.objective, [self.optimizer])


class _Zero(ABC):
    """Stages 1 to 3: what a worker updates lies in flat tensors, one for each group."""

    def __init__(self, zero: Any, names: dict[nn.Parameter, str], rank: int) -> None:
        self.zero, self.names, self.rank = zero, names, rank

    @abstractmethod
    def groups(self) -> Iterator[tuple[int, Tensor, bool]]:
        """(number, flat tensor of parameters, whether Muon updates it)."""

    @abstractmethod
    def places(self, number: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """(parameter, its first element here, where that lies in the flat tensor, how many follow)."""

    def momenta(self, number: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """The same for the momentum of a group that Muon updates."""
        return self.places(number)

    def momentum_size(self, number: int, flat: Tensor) -> int:
        """Elements of that momentum."""
        return flat.numel()

    @abstractmethod
    def updated(self) -> None:
        """Let the model see changed parameters."""

    def parameters(self) -> list[Piece]:
        """See Partition."""
        return [
            Piece(self.names[parameter], "parameter", start, flat.detach().narrow(0, offset, count))
            for number, flat, _ in self.groups()
            for parameter, start, offset, count in self.places(number)
        ]

    def kept(self) -> list[Piece]:
        """See Partition."""
        pieces = []
        for number, flat, muon in self.groups():
            state = self.zero.optimizer.state.get(flat, {})
            places = self.momenta(number) if muon else self.places(number)
            found = [key for key in OPTIMIZER_KEYS[muon] if key in state]
            for parameter, start, offset, count in places:
                name = self.names[parameter]
                pieces += [Piece(name, key, start, state[key].narrow(0, offset, count)) for key in found]
        return pieces

    def load(self, saved: SavedState) -> None:
        """See Partition."""
        for number, flat, muon in self.groups():
            if muon:
                momentum = flat.detach().new_zeros(self.momentum_size(number, flat))
                self.zero.optimizer.state[flat] = {MOMENTUM: momentum}
            else:
                prepare_state(self.zero.optimizer, flat, OPTIMIZER_KEYS[muon], saved.steps)
        with torch.no_grad():
            saved.fill([*self.parameters(), *self.kept()])
            self.updated()


class _Flat(_Zero):
    """Stages 1 and 2: a group's parameters lie one behind the other, cut into equal runs, one for each worker."""

    def groups(self) -> Iterator[tuple[int, Tensor, bool]]:
        """See _Zero."""
        for number, (flat, group) in enumerate(
            zip(self.zero.single_partition_of_fp32_groups, self.zero.optimizer.param_groups, strict=True)
        ):
            yield number, flat, group["use_muon"]

    def places(self, number: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """See _Zero."""
        for parameter in self.zero.bit16_groups[number]:
            mapping = parameter._hp_mapping
            if mapping is not None:
                place = mapping.hp_fragment_address
                yield parameter, mapping.lp_fragment_address.start, place.start, place.numel

    def momenta(self, number: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """Muon needs whole matrices: a worker has the momentum of all that it updates any part of."""
        offset = 0
        for parameter in self.zero.params_in_partition[number]:
            yield parameter, 0, offset, parameter.numel()
            offset += parameter.numel()

    def momentum_size(self, number: int, flat: Tensor) -> int:
        """See _Zero."""
        return sum(parameter.numel() for parameter in self.zero.params_in_partition[number])

    def updated(self) -> None:
        """See _Zero."""
        self.zero.update_lp_params()


class _Sharded(_Zero):
    """Stage 3: every parameter is cut into equal runs, one for each worker; the last may be filled up."""

    def groups(self) -> Iterator[tuple[int, Tensor, bool]]:
        """See _Zero."""
        for number, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            yield number, flat, bool(self.zero.use_muon and self.zero.sub_groups_using_muon[number])

    def places(self, number: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """See _Zero."""
        for parameter in self.zero.fp16_groups[number]:
            offset, share = self.zero.grad_position[self.zero.get_param_id(parameter)][1], parameter.partition_numel()
            start = self.rank * share
            if start < parameter.ds_numel:
                yield parameter, start, offset, min(share, parameter.ds_numel - start)

    def updated(self) -> None:
        """See _Zero. As at the end of DeepSpeed's own step."""
        for number in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if persistent := self.zero.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
