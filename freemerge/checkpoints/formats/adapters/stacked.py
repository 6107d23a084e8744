"""LoRA of parameters (PEFT's `target_parameters`), mostly the stacked experts of a layer.

If several parameters of a module have factors, PEFT wraps the module once for each, and the file does not say which
wrapper belongs to which parameter. The shapes in the base determine it.

Notation: E experts of rank r; m outputs, n inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations, product

import torch
from torch import Tensor

from freemerge.checkpoints.architecture import read_architecture
from freemerge.checkpoints.checkpoint import Checkpoint
from freemerge.checkpoints.formats.adapters.changes import BaseReader, Change, Run
from freemerge.checkpoints.formats.adapters.config import AdapterConfig
from freemerge.errors import CheckpointError

_SWAPPED = (0, 19)  # from this version on, PEFT reads (E, m, n) as outputs × inputs unless the module says otherwise


@dataclass(frozen=True)
class StackedLowRank(Change):
    """ΔW_e = s · B_e·A_e for each expert e; for a matrix without experts, ΔW = s · B·A.

    Args:
        weights: the adapter's file.
        left: the name of B in the file, (m, r·E), the experts side by side in each rank.
        right: the name of A in the file, (r·E, n), expert after expert.
        config: the adapter's configuration, which gives s.
        target: the name of the parameter.
        recent: cache of the factors that were read last, for the next chunk of their tensor.
        transposed: whether the base stores (E, n, m) rather than (E, m, n).
    """

    weights: Checkpoint
    left: str
    right: str
    config: AdapterConfig
    target: str
    recent: dict[str, Tensor] = field(repr=False)
    transposed: bool = False
    needs_base = True

    def shape(self, base: tuple[int, ...] | None) -> tuple[int, ...]:
        if base is not None:
            return base
        (outputs, ranks), (_, inputs) = self.weights.spec(self.left).shape, self.weights.spec(self.right).shape
        rank = self.config.values.get("r")
        experts = ranks // rank if isinstance(rank, int) and rank > 0 and ranks % rank == 0 else 1
        return (experts, outputs, inputs) if experts > 1 else (outputs, inputs)

    def orientations(self, base: tuple[int, ...]) -> tuple[bool, ...]:
        (outputs, ranks), (_, inputs) = self.weights.spec(self.left).shape, self.weights.spec(self.right).shape
        if len(base) == 2:
            return (False,) if base == (outputs, inputs) else ()
        if len(base) != 3 or not base[0] or ranks % base[0]:
            return ()
        sides = (outputs, inputs), (inputs, outputs)
        return tuple(transposed for transposed, side in zip((False, True), sides, strict=True) if base[1:] == side)

    def transposed_to(self, transposed: bool) -> StackedLowRank:
        return replace(self, transposed=transposed)

    def read(self, shape: tuple[int, ...], run: Run, base: BaseReader) -> Tensor:
        experts, height, width = shape if len(shape) == 3 else (1, *shape)
        rank = self.weights.spec(self.right).shape[0] // experts
        scale = self.config.scale(self.target, rank)
        left = self._factor(self.left).view(-1, rank, experts)  # (m, r, E)
        right = self._factor(self.right).view(experts, rank, -1)  # (E, r, n)
        start, stop = run or (0, experts * height * width)
        first, last = start // width, -(-stop // width)  # the rows of all experts in sequence
        rows = torch.empty(last - first, width)
        for expert in range(first // height, -(-last // height)):
            top, bottom = max(first, expert * height), min(last, (expert + 1) * height)
            part = slice(top - expert * height, bottom - expert * height)
            if self.transposed:
                block = right[expert].T[part] @ left[:, :, expert].T
            else:
                block = left[part, :, expert] @ right[expert]
            torch.mul(block, scale, out=rows[top - first : bottom - first])
        if run is None:
            return rows.view(shape)
        return rows.view(-1)[start - first * width : stop - first * width]

    def _factor(self, name: str) -> Tensor:
        if (found := self.recent.get(name)) is None:
            found = self.weights.tensor(name).float().contiguous()
            if len(self.recent) > 1:
                self.recent.clear()
            self.recent[name] = found
        return found


@dataclass(frozen=True)
class StackedModule:
    """The parameters of one module that have factors.

    Args:
        module: its name.
        parameters: its parameters that the configuration names, without the module's name.
        levels: the names of B and A in the adapter's file, one pair for each PEFT wrapper, the outermost first.
        weights: the adapter's file.
        config: the adapter's configuration.
        recent: see `StackedLowRank`.
    """

    module: str
    parameters: tuple[str, ...]
    levels: tuple[tuple[str, str], ...]
    weights: Checkpoint
    config: AdapterConfig
    recent: dict[str, Tensor] = field(repr=False)

    def changes(self, base: Checkpoint | None) -> dict[str, StackedLowRank]:
        """The changes of the parameters by the base's tensor names; without a base their assignment is arbitrary.

        Raises:
            CheckpointError: the base's shapes do not determine the assignment or the orientation of the factors.
        """
        if base is None or not any(base.has(f"{self.module}.{name}") for name in self.parameters):
            return dict(map(self._change, self.parameters, self.levels))
        present = [name for name in self.parameters if base.has(f"{self.module}.{name}")]
        shapes = {name: base.spec(f"{self.module}.{name}").shape for name in present}
        ways: list[dict[str, StackedLowRank]] = []
        for chosen in permutations(present, len(self.levels)):
            changes = dict(map(self._change, chosen, self.levels))
            fits = [change.orientations(shapes[name]) for name, change in zip(chosen, changes.values(), strict=True)]
            stacked = [len(shapes[name]) == 3 for name in chosen]
            for transposed in self._ways_round(fits, stacked):
                ways.append(
                    {
                        name: change.transposed_to(way)
                        for (name, change), way in zip(changes.items(), transposed, strict=True)
                    }
                )
        if len(ways) > 1:
            ways = self._told_by_model(base, ways)
        if len(ways) != 1:
            raise CheckpointError(self._misfit(shapes, bool(ways)))
        return ways[0]

    def _told_by_model(
        self, base: Checkpoint, ways: list[dict[str, StackedLowRank]]
    ) -> list[dict[str, StackedLowRank]]:
        """Keep the assignments that PEFT would choose, by the module's class and the order of its parameters."""
        architecture = read_architecture(base.folder)
        module = dict(architecture.model.named_modules()).get(self.module) if architecture else None
        if module is None:
            return ways
        transposed = bool(getattr(module, "is_transposed", False))
        order = [f"{self.module}.{name}" for name, _ in module.named_parameters(recurse=False)]
        return [
            way
            for way in ways
            if list(way) == [name for name in reversed(order) if name in way]
            and all(change.transposed == transposed for name, change in way.items() if len(base.spec(name).shape) == 3)
        ]

    def _change(self, parameter: str, level: tuple[str, str]) -> tuple[str, StackedLowRank]:
        target = f"{self.module}.{parameter}"
        return target, StackedLowRank(self.weights, *level, self.config, target, self.recent)

    def _ways_round(self, fits: Sequence[tuple[bool, ...]], stacked: Sequence[bool]) -> list[tuple[bool, ...]]:
        """The possible joint orientations of all parameters: a module's experts all have the same one."""
        ways = list(product(*fits))
        ways = [
            way for way in ways if len({transposed for transposed, deep in zip(way, stacked, strict=True) if deep}) < 2
        ]
        # Earlier versions of PEFT always took the first dimension of an expert as its inputs.
        early = [way for way in ways if all(transposed for transposed, deep in zip(way, stacked, strict=True) if deep)]
        return early if len(ways) > 1 and early and self._version() < _SWAPPED else ways

    def _version(self) -> tuple[int, ...]:
        parts = str(self.config.values.get("peft_version") or "0.0").split(".")[:2]
        return tuple(int(part) if part.isdecimal() and len(part) < 9 else 0 for part in parts)

    def _misfit(self, shapes: Mapping[str, Sequence[int]], several: bool) -> str:
        factors = [
            f"{list(self.weights.spec(left).shape)} · {list(self.weights.spec(right).shape)}"
            for left, right in self.levels
        ]
        held = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        reason = "fit them in more than one way" if several else "do not fit them"
        return (
            f"{self.config.path.parent}: the factors of '{self.module}' ({', '.join(factors)}) {reason}, the base has "
            f"{held}; merge the adapter into its base model with PEFT first"
        )
