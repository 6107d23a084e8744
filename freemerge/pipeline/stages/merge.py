"""The stage `merge`: merge the task vectors with every method, each at its best scale on validation data."""

from __future__ import annotations

from functools import partial
from typing import Any

from freemerge.errors import NotFiniteError
from freemerge.merging import Candidates, has_scale, merge, rescaled
from freemerge.pipeline.context import RunContext
from freemerge.pipeline.stages.statistics import collect_statistics


def merge_all(run: RunContext) -> None:
    """Merge the task vectors with every method, at the scale with the best mean score on validation data."""
    stage = run.files.merge_stage()
    if run.done(stage):
        return
    base, finetuned = run.files.base_weights(), run.files.finetuned_paths()
    heads = run.files.heads()
    run.begin(stage)
    collect_statistics(run)
    loaders = run.measure.loaders("val")
    candidates = Candidates(base, finetuned)
    individual = run.measure.individual(loaders)
    results: dict[str, Any] = {"individual": individual, "methods": {}}
    for name, line in run.settings.merge.lines.items():
        method = run.files.with_statistics(line)
        scalable = has_scale(method)
        scales = run.settings.merge.scales_of(method)
        tried = candidates.over_scales(method, scales) if scalable else [candidates.merge(method)]
        search = []
        for scale, weights in zip(run.with_bar(scales, f"merge: {name}"), tried, strict=True):
            weights = run.measure.with_own_statistics(weights)
            if (score := run.mean_score(partial(run.measure.shared, weights, heads, loaders))) is None:
                run.doubt(f"merge: {name} at scale {scale:g} computes NaN or infinite values, and is left out")
                continue
            search.append({"scale": scale, "mean_acc": score})
        if not search:
            raise NotFiniteError(f"merge: {name} computes NaN or infinite values at every scale: {scales}")
        best = max(search, key=lambda candidate: candidate["mean_acc"])
        chosen = rescaled(method, best["scale"]) if scalable else method
        run.write(run.files.merged_path(name), run.measure.with_own_statistics(merge(base, finetuned, chosen)))
        results["methods"][name] = {"search": search, "best": best}
        run.say(f"merge: {name}" + (f", scale {best['scale']:g}" if scalable else ""), best["mean_acc"])
    run.finish(stage, results)
