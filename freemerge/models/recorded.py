"""Passes of a backbone recorded as CUDA graphs.

On a GPU a small pass takes as long as its hundreds of kernels take to be started one by one, and a mixed batch is as
many small passes as it has tasks. A recorded pass is started at once. It reads inputs, weights and an expert's values
where they lay when it was recorded, so whatever they are now is written there first.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from freemerge.experts import PackedExpert
from freemerge.experts.layerwise import substituted
from freemerge.inputs import Inputs, batch_size, select
from freemerge.models.backbones import Backbone

_RECORDINGS = 32  # each takes seconds to make; what comes in more shapes than this is not worth it
_WARM_UPS = 2  # libraries choose their algorithms and allocate what they need before anything is recorded

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


@dataclass(frozen=True)
class _Recording:
    """One recorded pass: where it reads its inputs, how it is started, and where its features are then."""

    inputs: Inputs
    start: Callable[[], None]
    features: Tensor


class RecordedBackbone:
    """A backbone's passes, recorded one by one for every shape of inputs that comes more than once.

    A batch is padded to one of a few sizes. What cannot be recorded, as a model that looks at its inputs' values to
    decide what to do, is run as it is, after one warning.

    Args:
        backbone: the backbone, in evaluation mode on a GPU. Its weights may change, but must stay where they are.
        record: records a pass; see `record_graph`.
    """

    def __init__(self, backbone: Backbone, record: Record | None = None) -> None:
        self.backbone = backbone
        self._record = record or _graph_recorder()
        self._pointers = self._places()
        self._seen: Counter[Hashable] = Counter()
        self._made: dict[Hashable, _Recording] = {}
        self._slots: dict[Hashable, PackedExpert] = {}
        self.failed: str | None = None  # why nothing can be recorded, once that is known

    @property
    def current(self) -> bool:
        """Whether the weights still are where they were."""
        return self._places() == self._pointers

    def __call__(self, inputs: Inputs, expert: PackedExpert | None = None) -> Tensor:
        """Features (B, F) of a batch.

        Args:
            inputs: B ≥ 1 samples.
            expert: one whose changed weights exist for one layer at a time; sparse ones are switched into the weights.
        """
        size = batch_size(inputs)
        layout = None if expert is None else expert.layout
        key = (layout, _padded(size), _shapes(inputs))
        recording = self._made.get(key) or self._try_to_record(key, inputs, expert)
        if recording is None:
            return self._run(inputs, expert)
        if expert is not None:
            self._slots[layout].copy_(expert)
        for place, tensor in zip(_tensors(recording.inputs), _tensors(inputs), strict=True):
            place[:size].copy_(tensor)
        recording.start()
        return recording.features[:size].clone()  # its memory is written to by the next pass

    def _try_to_record(self, key: Hashable, inputs: Inputs, expert: PackedExpert | None) -> _Recording | None:
        self._seen[key] += 1
        if self.failed or self._seen[key] < 2 or len(self._made) >= _RECORDINGS:
            return None
        if expert is not None and expert.layout not in self._slots:
            self._slots[expert.layout] = expert.twin()
        slot = None if expert is None else self._slots[expert.layout]
        index = torch.arange(key[1], device=next(iter(_tensors(inputs))).device) % batch_size(inputs)
        held = select(inputs, index)
        try:
            start, features = self._record(lambda: self._run(held, slot))
        except RuntimeError as error:
            self.failed = str(error).strip().splitlines()[0]
            warnings.warn(
                f"the backbone cannot be recorded as a CUDA graph and runs without ({self.failed})", stacklevel=2
            )
            return None
        self._made[key] = _Recording(held, start, features)
        return self._made[key]

    def _run(self, inputs: Inputs, expert: PackedExpert | None) -> Tensor:
        if expert is None:
            return self.backbone(inputs)
        unpacked = expert.unpacked()
        with substituted(self.backbone.model, unpacked.shapes, unpacked.added):
            return self.backbone(inputs)

    def _places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self.backbone.parameters(), *self.backbone.buffers())]


def _graph_recorder() -> Record:
    """A `record_graph` whose graphs share their memory: a pass's features are taken before the next one starts."""
    pool = torch.cuda.graph_pool_handle()
    return lambda run: record_graph(run, pool)


def record_graph(run: Callable[[], Tensor], pool: tuple[int, int] | None = None) -> tuple[Callable[[], None], Tensor]:
    """Record what a function does on the GPU.

    Args:
        run: does the same whenever it is called, and never waits for the GPU.
        pool: of memory, shared with other recordings.

    Returns:
        A function that does it again, and the tensor where its result is then.

    Raises:
        RuntimeError: `run` waits for the GPU, or copies between it and the processor.
    """
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            run()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = run()
    finally:
        torch.cuda.set_stream(current)  # a recording that fails leaves its own behind
    return graph.replay, result


def _padded(size: int) -> int:
    """The next of the sizes 1, 2, … 8, 10, 12, 14, 16, 20, 24, …: at most a quarter more."""
    step = 1 << max((size - 1).bit_length() - 3, 0)
    return -(-size // step) * step


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [inputs] if isinstance(inputs, Tensor) else list(inputs.values())


def _shapes(inputs: Inputs) -> Hashable:
    """All that tells inputs apart but the number of samples and the values."""
    names = () if isinstance(inputs, Tensor) else tuple(inputs)
    return names, tuple((tensor.shape[1:], tensor.dtype, tensor.device) for tensor in _tensors(inputs))
