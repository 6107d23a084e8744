"""`check_expert`: whether a kind of expert of your own works with files, training and FreeModel."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freemerge.experts import Expert, PackedExpert, class_path, kind_of, load_expert, mix, save_expert
from freemerge.models import FreeModel, ModuleBackbone

_LOAD_SCRIPT = """
import sys, torch
from freemerge.experts import load_expert
shared = torch.load(sys.argv[2])
torch.save(load_expert(sys.argv[1], shared=shared, trust_remote_code=True).dense(), sys.argv[3])
"""


def check_expert(
    kind: type[Expert],
    make: Callable[[Mapping[str, Tensor]], Expert] | None = None,
    *,
    fresh_process: bool = True,
    **settings: Any,
) -> None:
    """Check a kind of expert in the ways that files, training and FreeModel use it.

    Args:
        kind: the class.
        make: function that makes an expert of a residual, tensor name → θ_k − θ_merged; None uses `kind.extract`.
        fresh_process: whether a new process also loads an expert's file and imports the class by its path. Classes that
            are defined in a notebook or a function cannot be imported.
        **settings: arguments of `kind.extract`.

    Raises:
        AssertionError: if a check fails; the message names it.
    """
    who = kind.__qualname__
    _require(isinstance(kind, type) and issubclass(kind, Expert), f"{who} is not derived from freemerge.experts.Expert")
    try:
        kind_of(kind)
    except ValueError as error:
        raise AssertionError(str(error)) from error
    torch.manual_seed(0)
    backbone = ModuleBackbone(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), feature_dim=5).eval()
    weights = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    residual = {name: 0.5 * torch.randn(tensor.shape) for name, tensor in weights.items()}
    expert = make(residual) if make is not None else kind.extract(residual, **settings)
    _require(type(expert) is kind, f"{who}: extracting an expert returns a {type(expert).__qualname__}")
    _check_shapes(who, expert, weights)
    _check_sums(who, expert, weights)
    _check_values(who, expert, weights)
    _check_files(who, expert, fresh_process)
    _check_model(who, expert, backbone)


def _check_shapes(who: str, expert: Expert, weights: Mapping[str, Tensor]) -> None:
    """`shapes` has tensors of the residual, with their shapes."""
    _require(bool(expert.shapes), f"{who}.shapes is empty: the expert of a residual changes nothing")
    for name, shape in expert.shapes.items():
        _require(name in weights, f"{who}.shapes names {name!r}, which the residual does not have")
        found = tuple(weights[name].shape)
        _require(tuple(shape) == found, f"{who}.shapes has {tuple(shape)} for {name!r}, expected {found}")


def _check_sums(who: str, expert: Expert, weights: Mapping[str, Tensor]) -> None:
    """`added` returns new tensors with the weights' shapes and dtypes, rounded once."""
    changed = False
    for name in expert.shapes:
        weight = weights[name].clone()
        sums = expert.added(name, weight)
        _require(torch.equal(weight, weights[name]), f"{who}.added changes its argument, the weight {name!r}")
        _require(sums.shape == weight.shape, f"{who}.added returns {name!r} with shape {tuple(sums.shape)}")
        _require(sums.dtype == weight.dtype, f"{who}.added returns {name!r} as {sums.dtype}, expected {weight.dtype}")
        _require(bool(sums.isfinite().all()), f"{who}.added makes {name!r} NaN or infinite")
        _close(f"{who}.added of {name!r} differs from call to call", expert.added(name, weight), sums)
        narrow = weight.bfloat16()
        rounded, wide = expert.added(name, narrow), expert.added(name, narrow.float())
        _require(rounded.dtype == torch.bfloat16, f"{who}.added of a bfloat16 weight is {rounded.dtype}")
        once = torch.equal(rounded, wide.bfloat16())
        _require(once, f"{who}.added of a bfloat16 weight is not the float32 sum rounded once, for {name!r}")
        changed |= not torch.equal(sums, weight)
    _require(changed, f"{who}.added changes no weight")


def _check_values(who: str, expert: Expert, weights: Mapping[str, Tensor]) -> None:
    """Values can be read, replaced, scaled and trained."""
    parts = expert.parts()
    _require(bool(parts), f"{who}.parts() is empty: there are no values to store or train")
    for name, part in parts.items():
        _require(part.is_floating_point(), f"{who}.parts() has {name!r} in {part.dtype}; values are floating point")
    again = expert.with_parts(parts)
    _require(type(again) is type(expert), f"{who}.with_parts returns a {type(again).__qualname__}")
    _same(f"{who}.with_parts(parts()) is another expert", expert, again, weights)
    _same(
        f"{who}.with_values(flat_values()) is another expert", expert, expert.with_values(expert.flat_values()), weights
    )
    scaled = expert.scaled(0.5)
    for name, weight in weights.items():
        if name in expert.shapes:
            half = weight + 0.5 * (expert.added(name, weight) - weight)
            _close(f"{who}.scaled(0.5) does not halve what is added to {name!r}", scaled.added(name, weight), half)
    tagged = expert.tagged(task="some task")
    _require(tagged.metadata.get("task") == "some task", f"{who}: `tagged` does not set the metadata")
    values = expert.flat_values().clone().requires_grad_()
    student = expert.with_values(values)
    total = torch.stack([student.added(name, weights[name]).square().sum() for name in expert.shapes]).sum()
    _require(total.requires_grad, f"{who}.added is not differentiable in the values")
    total.backward()
    found = values.grad is not None and bool(values.grad.isfinite().all()) and bool(values.grad.any())
    _require(found, f"{who}: no gradient reaches the values, so it cannot be trained")
    if type(expert).MIXES:
        both = mix([expert, scaled], [0.5, 1.0])
        _same(f"{who}.mixed([e, e/2], [0.5, 1]) is not the expert itself", expert, both, weights)


def _check_files(who: str, expert: Expert, fresh_process: bool) -> None:
    """Packing and an unrounded file reproduce the expert, also in a process that has not imported its class."""
    shared = expert.shared if type(expert).SHARES else None
    packed = PackedExpert(expert)
    _same(f"{who}: PackedExpert unpacks another expert", expert, packed.unpacked())
    with tempfile.TemporaryDirectory() as folder:
        path = save_expert(Path(folder) / "expert.safetensors", expert.tagged(task="some task"), "float32")
        loaded = load_expert(path, shared=shared)
        _require(type(loaded) is type(expert), f"{who}: its file is loaded as a {type(loaded).__qualname__}")
        _require(loaded.metadata.get("task") == "some task", f"{who}.restored loses the metadata")
        _same(f"{who}: its file contains another expert", expert, loaded)
        if not fresh_process:
            return
        given, found = Path(folder) / "shared.pt", Path(folder) / "dense.pt"
        torch.save(None if shared is None else dict(shared), given)
        command = [sys.executable, "-c", _LOAD_SCRIPT, str(path), str(given), str(found)]
        run = subprocess.run(command, capture_output=True, text=True)
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        named = class_path(type(expert)) or who
        _require(run.returncode == 0, f"{who}: a new process cannot load its file by the class path {named} ({last})")
        for name, dense in torch.load(found).items():
            _close(f"{who}: a new process loads another expert", dense, expert.dense()[name])


def _check_model(who: str, expert: Expert, backbone: ModuleBackbone) -> None:
    """FreeModel computes with the expert and has it in its state dict."""
    inputs = torch.randn(4, 6)
    model = FreeModel(backbone, {"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)}, {"a": expert}).eval()
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for name, tensor in other.weights().items():
            if name in expert.shapes:
                tensor.copy_(expert.added(name, tensor))
        expected = model.heads["a"](other(inputs))
        _close(f"{who}: FreeModel returns other logits with it", model(inputs, task="a").logits, expected)
        _close(f"{who}: FreeModel.task_model has other weights", model.task_model("a")(inputs), expected)
        loaded = FreeModel(copy.deepcopy(backbone), {"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)}).eval()
        loaded.load_state_dict(model.state_dict())
        _close(f"{who}: FreeModel's state_dict does not contain it", loaded(inputs, task="a").logits, expected)


def _same(message: str, expert: Expert, other: Expert, weights: Mapping[str, Tensor] | None = None) -> None:
    """Two experts have the same effect on weights, by default on zeros."""
    _require(other.shapes == expert.shapes, f"{message}: it changes other tensors")
    for name, shape in expert.shapes.items():
        weight = torch.zeros(shape) if weights is None else weights[name]
        _close(f"{message}, at {name!r}", other.added(name, weight), expert.added(name, weight))


def _close(message: str, found: Tensor, expected: Tensor) -> None:
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    _require(same, message)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
