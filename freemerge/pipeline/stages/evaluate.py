"""The stage `evaluate`: evaluate all models on test data; write the FREE model, the report and the picture."""

from __future__ import annotations

from freemerge.evaluation import Report
from freemerge.models import has_experts
from freemerge.pipeline.context import RunContext
from freemerge.pipeline.ranks import is_first
from freemerge.pipeline.reporting import doubts_of, make_report


def evaluate(run: RunContext) -> Report:
    """Evaluate all models on all tasks' test data; write the FREE model, the report and the picture.

    If the stages of the experts were left out, the report ends with the merged models, and the FREE model is the merged
    backbone with its heads. It does not replace an existing FREE model with experts.

    Args:
        run: the run.

    Returns:
        The report.
    """
    model = run.files.free_model() if run.files.has_experts() or "experts" in run.stages else None
    report = make_report(run.files, run.measure, model)
    if is_first():
        folder = run.folder / "free_model"
        if model is not None:
            model.save_pretrained(folder)
        elif not has_experts(folder):
            run.files.merged_model().save_pretrained(folder)
        report.write_json(run.folder / "report.json")
        report.plot(run.folder / "report.png")
        report.print(run.console)
        for doubt in doubts_of(report, run.settings.merge.free):
            run.doubt(doubt)
        run.console.print(f"[dim]{run.folder}/report.json, report.png and free_model/ hold the rest[/dim]")
    return report
