"""`check_method`: whether a merging method of your own has the properties that the engine relies on."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from freemerge.checkpoints import load_checkpoint, open_checkpoint
from freemerge.merging import (
    Candidates,
    Combiner,
    MergeError,
    MergeMethod,
    Reader,
    describe_method,
    has_scale,
    make_plan,
    merge,
    merge_to,
    rescaled,
)
from freemerge.runtime.threads import one_thread

_Tensors = Mapping[str, Tensor]


def check_method(method: MergeMethod, models: int = 3, *, symmetric: bool = True) -> None:
    """Check a merging method in the ways that the engine uses it: in memory, to a file, in a search, and in chunks.

    The check merges small models with every kind of tensor: square, wide and tall matrices, an embedding, a
    convolution, stacked experts, a vector, a scalar and an integer buffer.

    Args:
        method: the method, with parameters for this number of models.
        models: number K of fine-tuned models.
        symmetric: whether the result does not depend on the order of the models. Not checked if a parameter is a list
            with one value per model.

    Raises:
        AssertionError: if a check fails; the message names it.
    """
    kind = type(method).__name__
    _check_value(kind, method)
    try:
        _check_merges(kind, method, models, symmetric)
    except MergeError as error:
        raise AssertionError(f"{kind} cannot merge the models of the check: {error}") from error


def _check_merges(kind: str, method: MergeMethod, models: int, symmetric: bool) -> None:
    """Every way to merge returns the same values, repeatedly."""
    base = _make_base()
    named = {f"model {index}": _finetune(base, index) for index in range(models)}
    before = copy.deepcopy((base, named))

    merged = merge(base, named, method)
    _same(f"{kind} changes its inputs", before[0], base)
    for label, model in named.items():
        _same(f"{kind} changes its inputs", before[1][label], model)
    _same(f"{kind} is not deterministic: a second merge differs", merged, merge(base, named, method))
    with one_thread():
        _same(f"{kind}'s result depends on the number of threads", merged, merge(base, named, method))
    _check_combine(kind, method, base, named)

    with tempfile.TemporaryDirectory() as folder:
        path = merge_to(base, named, method, Path(folder) / "merged.safetensors")
        _same(f"{kind}'s result in a file differs from that in memory", merged, load_checkpoint(path))
    candidates = Candidates(base, named)
    _same(f"{kind}'s result in a search differs from that of a merge", merged, candidates.merge(method))
    _check_scales(kind, method, candidates)
    _check_statistics(kind, method, base, named)

    zeros = merge(base, {label: copy.deepcopy(base) for label in named}, method)
    _same(f"{kind} of models that equal the base is not the base", base, zeros)
    if symmetric and models > 1 and not _has_lists(method):
        other = merge(base, dict(reversed(named.items())), method)
        message = f"{kind}'s result depends on the order of the models (if this is intended, pass symmetric=False)"
        _same(message, merged, other, tolerance=1e-4)


def _check_value(kind: str, method: MergeMethod) -> None:
    """A method is a plain value: equal to its copies, picklable, immutable, and serialisable in a merge's record."""
    _require(isinstance(method, MergeMethod), f"{kind} is not derived from freemerge.merging.MergeMethod")
    _require(dataclasses.is_dataclass(method), f"{kind} is not a dataclass; decorate it with @dataclass(frozen=True)")
    _require(method == copy.deepcopy(method), f"{kind} does not equal its copy; compare its parameters, not identity")
    try:
        sent = pickle.loads(pickle.dumps(method))
    except Exception as error:
        raise AssertionError(f"{kind} cannot be sent to another process: {error}") from None
    _require(sent == method, f"{kind} differs after pickling")
    field = next((field.name for field in dataclasses.fields(method)), None)
    if field is not None:
        try:
            setattr(copy.copy(method), field, getattr(method, field))
        except dataclasses.FrozenInstanceError:
            pass
        else:
            raise AssertionError(f"{kind} is mutable; decorate it with @dataclass(frozen=True)")
    try:
        json.dumps(describe_method(method))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{kind}'s parameters cannot be written into freemerge.json: {error}") from None


def _check_combine(kind: str, method: MergeMethod, base: _Tensors, named: Mapping[str, _Tensors]) -> None:
    """`combine` returns float32 tensors; chunks of elementwise methods have the same values as whole tensors."""
    reader = _reader(base, named)
    vectors = reader.vectors()
    combiner = Combiner.of(method, vectors)
    for name in vectors.shapes:
        whole = combiner.whole(name, reader.read(name).deltas)
        _require(whole.dtype == torch.float32, f"{kind}.combine returns {whole.dtype} for '{name}'; return float32")
        if not method.elementwise:
            continue
        deltas, parts = reader.read(name).deltas.reshape(len(named), -1), []
        for start in range(0, deltas.shape[1], 7):
            parts.append(combiner.chunk(name, start, deltas[:, start : start + 7].clone()))
        joined = torch.cat(parts).view(whole.shape)
        joined = combiner.finish(name, joined) if method.finishes else joined
        close = torch.allclose(joined, whole, rtol=1e-5, atol=1e-6)
        _require(close, f"{kind} is elementwise, but chunks of '{name}' have other values than the whole tensor")


def _check_scales(kind: str, method: MergeMethod, candidates: Candidates) -> None:
    """A search over λ has the same results as separate merges."""
    if not has_scale(method):
        return
    factors = [0.5, 1.5]
    for factor, found in zip(factors, candidates.over_scales(method, factors), strict=True):
        expected = candidates.merge(rescaled(method, factor))
        message = f"{kind} sets linear_in_scale, but its result at scale {factor} differs"
        _same(message, expected, found, tolerance=1e-5)


def _check_statistics(kind: str, method: MergeMethod, base: _Tensors, named: Mapping[str, _Tensors]) -> None:
    """Methods with equal keys share statistics, so parameters outside of the key must not change them."""
    equal = method.statistics_key == copy.deepcopy(method).statistics_key
    _require(equal, f"{kind}: its copy has another statistics_key, so a search cannot share statistics")
    if method.statistics_fields is None or not has_scale(method):
        return
    other = rescaled(method, 0.25)
    if other.statistics_key != method.statistics_key:
        return
    reader = _reader(base, named)
    own, shared = Combiner.of(other, reader.vectors()), Combiner.of(method, reader.vectors()).of_method(other)
    for name in reader.plan.weights:
        same = torch.equal(own.whole(name, reader.read(name).deltas), shared.whole(name, reader.read(name).deltas))
        _require(same, f"{kind}: its statistics depend on `scale`, which statistics_fields does not name")


def _reader(base: _Tensors, named: Mapping[str, _Tensors]) -> Reader:
    """A reader of the base and the fine-tuned models."""
    models = [open_checkpoint(model, label=label) for label, model in named.items()]
    return Reader(make_plan(open_checkpoint(base, label="base"), models))


def _has_lists(part: object) -> bool:
    """Whether a method or one of its parameters contains a list or tuple."""
    if isinstance(part, (list, tuple)):
        return True
    if isinstance(part, Mapping):
        return any(map(_has_lists, part.values()))
    if dataclasses.is_dataclass(part):
        return any(_has_lists(getattr(part, field.name)) for field in dataclasses.fields(part))
    return False


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _same(message: str, expected: _Tensors, found: _Tensors, tolerance: float = 0.0) -> None:
    for name, tensor in expected.items():
        if not torch.allclose(found[name], tensor, rtol=tolerance, atol=tolerance):
            raise AssertionError(f"{message}; the first tensor is '{name}'")


def _make_base() -> dict[str, Tensor]:
    """A base with every kind of tensor."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "embed.weight": normal(19, 6),
        "wide.weight": normal(5, 12),
        "tall.weight": normal(12, 5),
        "square.weight": normal(8, 8),
        "conv.weight": normal(4, 3, 3, 3),
        "experts.gate_up_proj": normal(3, 6, 4),
        "norm.weight": normal(6),
        "norm.bias": normal(6),
        "temperature": normal(),
        "steps": torch.tensor(3),
    }


def _finetune(base: _Tensors, seed: int) -> dict[str, Tensor]:
    """The base with noise on its floating-point tensors."""
    generator = torch.Generator().manual_seed(1 + seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }
