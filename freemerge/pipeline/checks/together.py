"""Checks of the stages that use all tasks: a mixed batch, the router's inputs, and mixup for experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freemerge.inputs import Inputs, join, to_device
from freemerge.models import Backbone, ConvRouter, EarlyRouter, feature_width
from freemerge.pipeline.checks.findings import Findings
from freemerge.pipeline.checks.samples import cast_for, describe
from freemerge.pipeline.settings import ExpertsSettings, RouterSettings


def check_mixture(inputs: Mapping[str, Inputs], wanted_by: str, instead: str, findings: Findings) -> Inputs | None:
    """Join all tasks' inputs into one batch, as router training does.

    Args:
        inputs: task → a few samples.
        wanted_by: the setting that needs the batch.
        instead: what the user can do to avoid it.
        findings: receives a fault.

    Returns:
        The batch; None if the inputs cannot be joined.
    """
    try:
        return join(list(inputs.values()))
    except (ValueError, RuntimeError, TypeError, KeyError):
        kinds: dict[str, list[str]] = {}
        for task, part in inputs.items():
            kinds.setdefault(describe(part), []).append(task)
        found = "; ".join(f"{', '.join(tasks)}: {kind}" for kind, tasks in kinds.items())
        findings.fault(
            f"{wanted_by} takes batches of all tasks, whose inputs differ ({found}): make them alike, or {instead}"
        )
        return None


def check_router(
    inputs: Inputs,
    names: Sequence[str],
    settings: RouterSettings,
    backbone: Backbone,
    device: torch.device,
    findings: Findings,
) -> None:
    """Check that a router of the configured kind computes on a batch of all tasks.

    Args:
        inputs: a few samples of each task.
        names: names of the tasks.
        settings: the router's settings.
        backbone: the backbone, on `device`.
        device: where to compute.
        findings: receives a fault.
    """
    if settings.kind == "conv":
        if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.is_floating_point():
            findings.fault(
                f"router.kind: conv is for images, but {_no_images(names[0], inputs)}; choose router.kind: early"
            )
            return
        ConvRouter(len(names), inputs.shape[1], settings.width, **settings.judging).eval()(inputs)
        return
    placed = cast_for(backbone, to_device(inputs, device))
    try:
        width = feature_width(placed, backbone, settings.point)
        segments = 2 if isinstance(inputs, Mapping) and "token_type_ids" in inputs else 1
        router = EarlyRouter(len(names), settings.point, width, segments, **settings.judging).to(device).eval()
        router(placed, backbone)
    except Exception as error:  # a model may raise anything
        said = " ".join(str(error).split())
        findings.fault(
            f"router.point: an early router cannot look at {settings.point!r} for inputs {describe(inputs)}: "
            f"{said or type(error).__name__}; name a submodule that puts out tokens (B, N, F) or maps (B, F, H, W)"
        )


def check_expert_inputs(task: str, inputs: Inputs, settings: ExpertsSettings, findings: Findings) -> None:
    """Check that mixup, if it is on, has images to blend."""
    if settings.mixup > 0 and not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        findings.fault(f"experts.mixup is for images, but {_no_images(task, inputs)}; set it to 0")


def _no_images(task: str, inputs: Inputs) -> str:
    found = f"have the keys {', '.join(inputs)}" if isinstance(inputs, Mapping) else f"are {describe(inputs)}"
    return f"the inputs of task {task!r} are not images (C, H, W): they {found}"
