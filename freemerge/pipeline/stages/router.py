"""The stage `router`: train the router on a mixture of all tasks."""

from __future__ import annotations

from freemerge.pipeline.context import RunContext
from freemerge.training import (
    RouterTrainer,
)


def router(run: RunContext) -> None:
    """Train the router on a mixture of all tasks."""
    stage = run.files.router_stage()
    if run.done(stage):
        return
    settings = run.settings.router
    data = run.suite.mixture(batch_size=settings.batch_size)
    resume = run.begin(stage)
    run.seed_stage(stage)
    backbone = run.files.backbone(run.files.free_weights()) if settings.kind == "early" else None
    module = RouterTrainer(run.files.new_router(), backbone, **settings.optimization)
    fit = run.fit(stage, module, data, settings.trainer, resume, module.monitor)
    threshold = module.calibrate(data.train_dataloader(), data.val_dataloader(), settings.fraction)
    run.write(stage.path / "router.safetensors", module.router.stored())
    run.finish(stage, {module.monitor: fit.value, "threshold": threshold})
    tasks = len(run.suite.names)
    chance = 1 / tasks
    if fit.value is not None and tasks > 1 and fit.value < chance + 0.1 * (1 - chance):
        run.doubt(
            f"router: {module.monitor} is {fit.value:.3f}, and guessing among {tasks} tasks gives {chance:.3f}: "
            "it cannot tell their inputs apart; try another router.point or more epochs, or name each input's task"
        )
