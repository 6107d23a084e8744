"""A run over a suite: one backbone, several tasks, from pretraining to the report.

    pretrain → finetune (each task) → merge (each method) → experts (each task) → router → evaluate

Every stage has its folder under the run's, is skipped when it is done, and goes on where it was interrupted
(`StageFolder`). Every fit has a fresh Trainer, so all of Lightning's flags keep their meaning in each.

    <run>/pretrain/               base.safetensors           (or in the cache of pretrained backbones)
    <run>/finetune/<task>/        backbone.safetensors, head.safetensors
    <run>/merge/                  <method>.safetensors       merged backbones
    <run>/extracted/              <task>.safetensors         experts cut out of the residuals
    <run>/experts/<task>/         expert.safetensors         trained
    <run>/router/                 router.safetensors
    <run>/free_model/             everything, for FreeModel.from_pretrained
    <run>/base.safetensors, report.json, report.png
"""

from __future__ import annotations

import copy
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import freemerge
from freemerge.checkpoints import hash_tensors, load_checkpoint, save_checkpoint
from freemerge.data import TaskSuite
from freemerge.evaluation import LabelSpace, Report, Row, evaluate, mean_score
from freemerge.experts import extract, load_expert, save_expert
from freemerge.merging import apply_task_vector, merge, merge_task_vectors, task_vector
from freemerge.models import FreeModel, Router
from freemerge.pipeline.folder import StageFolder
from freemerge.pipeline.settings import STAGES, Settings
from freemerge.training import Distillation, ExpertTrainer, FineTuner, RouterTrainer, gradient_rms

MakeTrainer = Callable[..., L.Trainer]
"""(folder, overrides, extra callbacks) → a fresh Trainer that logs into the folder."""


class SuiteRun:
    """All stages over one suite.

    Args:
        tuner: the template that is fine-tuned on each task; its backbone is the base, or, where the suite has
            pretraining data, what is pretrained to become the base.
        suite: the tasks.
        folder: the run's folder.
        make_trainer: makes each fit's Trainer.
        settings: the stages' settings.
        config: the configuration as plain data, by top-level key (model, trainer, pretrain, …); stages depend on it.
        seed: every stage's randomness derives from it and the stage's name, so that skipping one changes no other.
        ckpt_path: checkpoint to resume from, where the stages to run consist of exactly one fit.
    """

    def __init__(
        self,
        tuner: FineTuner,
        suite: TaskSuite,
        folder: str | Path,
        make_trainer: MakeTrainer,
        settings: Settings | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        ckpt_path: str | None = None,
    ) -> None:
        self.tuner = tuner
        self.suite = suite
        self.folder = Path(folder)
        self.make_trainer = make_trainer
        self.settings = settings or Settings()
        self.config = dict(config or {})
        self.seed = seed
        self.ckpt_path = ckpt_path
        self.console = Console(quiet=rank_zero_only.rank != 0, highlight=False)
        self._device: torch.device | None = None
        self._stages: tuple[str, ...] = ()

    # -- the whole ----------------------------------------------------------------------------------------------------

    def run(self, stages: Sequence[str] = STAGES) -> Report | None:
        """Run the chosen stages in their order; what is done already is skipped.

        Returns:
            The report, if `evaluate` is among the stages.

        Raises:
            ValueError: for an unknown stage, a stage whose input has not been made, or a `ckpt_path` that could mean
                several fits.
        """
        unknown = [stage for stage in stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"run.stages: unknown stage {unknown[0]!r}; stages: {', '.join(STAGES)}")
        self._stages = tuple(stage for stage in STAGES if stage in stages)
        self._check_ckpt_path()
        began = time.monotonic()
        report = None
        for stage in self._stages:
            report = getattr(self, stage)()
        self.console.print(f"[dim]{self.folder}: {time.monotonic() - began:.0f} s[/dim]")
        return report

    def _check_ckpt_path(self) -> None:
        if self.ckpt_path is None:
            return
        fits = {"pretrain": 1, "router": 1, "finetune": len(self.suite.names), "experts": len(self.suite.names)}
        if sum(fits.get(stage, 0) for stage in self._stages) != 1:
            raise ValueError(
                "--ckpt_path: these stages fit several models, and an interrupted run resumes by itself; to resume one "
                "fit from a checkpoint, choose it, for instance --run.stages '[finetune]' --data.tasks '[digits]'"
            )

    # -- stages -------------------------------------------------------------------------------------------------------

    def pretrain(self) -> None:
        """Fit the backbone on the suite's pretraining data, and keep it as the base."""
        stage = self._pretrain_stage()
        if stage is None:
            return
        if not self._done(stage):
            self._pretrain(stage)
        if rank_zero_only.rank == 0:  # where the run's own folder shows it, and other commands find it
            shutil.copyfile(stage.path / "base.safetensors", self.folder / "base.safetensors")

    def _pretrain(self, stage: StageFolder) -> None:
        resume = stage.begin(self.ckpt_path)
        settings = self.settings.pretrain
        data = self.suite.pretraining_data(batch_size=settings.batch_size)
        self._seed(stage)
        tuner = FineTuner(copy.deepcopy(self.tuner.backbone), data.num_classes, head="linear", **settings.optimization)
        trainer = self._fit(stage, tuner, data, settings.trainer, resume, monitor="val/acc")
        self._write(stage.path / "base.safetensors", tuner.backbone.weights())
        self._finish(stage, {"val/acc": _metric(trainer, "val/acc")})

    def finetune(self) -> None:
        """Fine-tune the base on each task: the individual models."""
        for task in self.suite.names:
            stage = self._finetune_stage(task)
            if self._done(stage):
                continue
            data = self.suite.for_task(task)
            tuner = self.base_tuner()
            resume = stage.begin(self.ckpt_path)
            self._seed(stage)
            tuner = tuner.for_task(data.num_classes)
            trainer = self._fit(stage, tuner, data, self.settings.finetune.trainer, resume, monitor="val/acc")
            best = trainer.checkpoint_callback.best_model_path if trainer.checkpoint_callback else ""
            if self.settings.finetune.weights == "best" and best:
                tuner.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
            self._write(stage.path / "backbone.safetensors", tuner.backbone.weights())
            self._write(stage.path / "head.safetensors", tuner.head.state_dict())
            self._finish(stage, {"val/acc": _metric(trainer, "val/acc")})

    def merge(self) -> None:
        """Merge the task vectors by every method, at the scale that does best on validation data."""
        stage = self._merge_stage()
        if self._done(stage):
            return
        base, finetuned = self.base_weights(), self.finetuned_weights()
        heads = self.heads()
        stage.begin()
        loaders = self._loaders("val")
        vectors = [task_vector(base, weights) for weights in finetuned.values()]
        individual = self._evaluate_individual(loaders)
        results: dict[str, Any] = {"individual": individual, "methods": {}}
        for name, method in self.settings.merge.methods.items():
            scalable = hasattr(method, "scale")
            # Every method's result is linear in its scale: merge once, try all scales on the one merged vector.
            merged = merge_task_vectors(vectors, replace(method, scale=1.0) if scalable else method)
            search = []
            for scale in self._each_scale(f"merge: {name}") if scalable else [1.0]:
                scores = self._evaluate_shared(apply_task_vector(base, merged, scale), heads, loaders)
                search.append({"scale": scale, "mean_acc": mean_score(scores)})
            best = max(search, key=lambda candidate: candidate["mean_acc"])
            chosen = replace(method, scale=best["scale"]) if scalable else method
            if rank_zero_only.rank == 0:
                merge(base, finetuned, chosen, output=self._merged_path(name))
            results["methods"][name] = {"search": search, "best": best}
            self._say(f"merge: {name}" + (f", scale {best['scale']:g}" if scalable else ""), best["mean_acc"])
        self._finish(stage, results)

    def experts(self) -> None:
        """Extract every task's expert from its residual, then train it against its teacher."""
        extraction = self._extraction_stage()
        if not self._done(extraction):
            self._extract_experts(extraction)
        for task in self.suite.names:
            stage = self._expert_stage(task)
            if self._done(stage):
                continue
            settings = self.settings.experts
            tuner = self.base_tuner()
            start = load_expert(self._extracted_path(task), self.free_weights())
            tuner.backbone.load_weights(self.free_weights())
            head, teacher = self.heads()[task], self.finetuned_weights()[task]
            resume = stage.begin(self.ckpt_path)
            self._seed(stage)
            trainer_module = ExpertTrainer(
                tuner.backbone,
                head,
                teacher,
                start,
                **settings.optimization,
                feature_weight=settings.feature_weight,
                logit_weight=settings.logit_weight,
                temperature=settings.temperature,
            )
            data = self.suite.for_task(task, batch_size=settings.batch_size)
            trainer = self._fit(stage, trainer_module, data, settings.trainer, resume, monitor="val/agreement")
            if rank_zero_only.rank == 0:
                save_expert(self._expert_path(task), trainer_module.expert)
            self._finish(stage, {"val/agreement": _metric(trainer, "val/agreement")})

    def _extract_experts(self, stage: StageFolder) -> None:
        settings = self.settings.experts
        merged, finetuned, heads = self.free_weights(), self.finetuned_weights(), self.heads()
        stage.begin()
        merged_hash = hash_tensors(merged)
        experts = {
            task: extract(
                task_vector(merged, weights),
                settings.density,
                scope=settings.scope,
                importance=self._importance(stage, task, merged, weights, heads[task]),
                rescale=settings.rescale,
                metadata={"task": task, "merged_hash": merged_hash},
            )
            for task, weights in finetuned.items()
        }
        loaders = self._loaders("val")
        search = []
        for scale in self._each_scale("experts: extracted"):
            scaled = {task: expert.scaled(scale) for task, expert in experts.items()}
            scores = self._evaluate_free(FreeModel(self._backbone(merged), heads, scaled), loaders, oracle=True)
            search.append({"scale": scale, "mean_acc": mean_score(scores)})
        best = max(search, key=lambda candidate: candidate["mean_acc"])
        if rank_zero_only.rank == 0:
            for task, expert in experts.items():
                save_expert(self._extracted_path(task), expert.scaled(best["scale"]))
        self._finish(stage, {"search": search, "best": best})
        self._say(f"experts: extracted, scale {best['scale']:g}", best["mean_acc"])

    def _importance(
        self,
        stage: StageFolder,
        task: str,
        merged: Mapping[str, Tensor],
        finetuned: Mapping[str, Tensor],
        head: nn.Module,
    ) -> dict[str, Tensor] | None:
        """What weighs a residual's magnitude: √ of the gradients' root mean square.

        Of the powers 0, ¼, ½ and 1 of it, the quickstart's experts did best with ¼ and ½.
        """
        settings = self.settings.experts
        if settings.importance == "none":
            return None
        self._seed(stage)
        data = self.suite.for_task(task, batch_size=settings.batch_size)
        data.prepare_data()
        data.setup("fit")
        loss = Distillation(settings.feature_weight, settings.logit_weight, settings.temperature)
        batches, count = data.train_dataloader(), settings.importance_batches
        rms = gradient_rms(self._backbone(merged), head, finetuned, batches, loss, count, self._where())
        return {name: tensor.sqrt() for name, tensor in rms.items()}

    def router(self) -> None:
        """Train the router on a mixture of all tasks."""
        stage = self._router_stage()
        if self._done(stage):
            return
        settings = self.settings.router
        data = self.suite.mixture(batch_size=settings.batch_size)
        resume = stage.begin(self.ckpt_path)
        self._seed(stage)
        module = RouterTrainer(
            Router(len(self.suite.names), self.suite.image_shape[0], settings.grid, settings.hidden),
            **settings.optimization,
        )
        trainer = self._fit(stage, module, data, settings.trainer, resume, monitor="val/acc")
        self._write(stage.path / "router.safetensors", module.router.state_dict())
        self._finish(stage, {"val/acc": _metric(trainer, "val/acc")})

    def evaluate(self) -> Report:
        """Evaluate everything on all tasks' test data; write the FREE model, the report and the picture."""
        model = self.free_model()
        merge_record = self._require(self._merge_stage())["results"]
        extraction = self._require(self._extraction_stage())["results"]
        loaders = self._loaders("test")
        heads = self.heads()
        size = self._file_size(self._merged_path(self.settings.merge.free))
        rows = [
            Row("base (zero-shot)", self._evaluate_shared(self.base_weights(), heads, loaders), 0),
            Row("individual", self._evaluate_individual(loaders), (len(self.suite.names) - 1) * size),
        ]
        for name in self.settings.merge.methods:
            scores = self._evaluate_shared(load_checkpoint(self._merged_path(name)), heads, loaders)
            rows.append(Row(name, scores, 0, chosen=merge_record["methods"][name]["best"]))
        tasks = self.suite.names
        merged = self.free_weights()
        extracted = {task: load_expert(self._extracted_path(task), merged) for task in tasks}
        expert_bytes = sum(self._file_size(self._expert_path(task)) for task in tasks)
        router_bytes = self._file_size(self._router_stage().path / "router.safetensors")
        rows += [
            Row(
                "FREE extracted (oracle)",
                self._evaluate_free(FreeModel(self._backbone(merged), heads, extracted), loaders, oracle=True),
                sum(self._file_size(self._extracted_path(task)) for task in tasks),
                chosen=extraction["best"],
            ),
            Row(
                "FREE trained (routed)",
                self._evaluate_free(model, loaders, oracle=False),
                expert_bytes + router_bytes,
            ),
            Row(
                "FREE trained (oracle)",
                self._evaluate_free(model, loaders, oracle=True),
                expert_bytes,
            ),
            Row("router accuracy", self._evaluate_router(model, loaders), router_bytes, kind="router"),
        ]
        search = {name: entry["search"] for name, entry in merge_record["methods"].items()}
        report = Report(
            title=f"{type(self.suite).__name__}: test accuracy (%), {len(tasks)} tasks, seed {self.seed}",
            rows=rows,
            search={**search, "FREE extracted": extraction["search"]},
            settings=self._provenance(size),
        )
        if rank_zero_only.rank == 0:
            model.save_pretrained(self.folder / "free_model")
            report.write_json(self.folder / "report.json")
            report.plot(self.folder / "report.png")
            report.print(self.console)
            self.console.print(f"[dim]{self.folder}/report.json, report.png and free_model/ hold the rest[/dim]")
        return report

    def _provenance(self, backbone_bytes: int) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "suite": self.suite.identity(),
            "split": {"chosen_on": "val", "reported_on": "test"},
            "backbone_bytes": backbone_bytes,
            "density": self.settings.experts.density,
            "free_on": self.settings.merge.free,
            "versions": {"freemerge": freemerge.__version__, "torch": torch.__version__, "lightning": L.__version__},
        }

    # -- what earlier stages left behind ------------------------------------------------------------------------------

    def base_tuner(self) -> FineTuner:
        """A copy of the template with the base's weights."""
        tuner = copy.deepcopy(self.tuner)
        tuner.backbone.load_weights(self.base_weights())
        return tuner

    def base_weights(self) -> dict[str, Tensor]:
        """The base: pretrained here, or as the template's backbone came."""
        stage = self._pretrain_stage()
        if stage is None:
            return self.tuner.backbone.weights()
        self._require(stage)
        return load_checkpoint(stage.path / "base.safetensors")

    def finetuned_weights(self) -> dict[str, dict[str, Tensor]]:
        """Task → weights of its individual model's backbone."""
        return {
            task: load_checkpoint(self._require_folder(self._finetune_stage(task)) / "backbone.safetensors")
            for task in self.suite.names
        }

    def heads(self) -> dict[str, nn.Linear]:
        """Task → head."""
        heads = {}
        for task in self.suite.names:
            state = load_checkpoint(self._require_folder(self._finetune_stage(task)) / "head.safetensors")
            classes, width = state["weight"].shape
            heads[task] = nn.Linear(width, classes)
            heads[task].load_state_dict(state)
        return heads

    def free_weights(self) -> dict[str, Tensor]:
        """The merged backbone that carries the experts."""
        self._require(self._merge_stage())
        return load_checkpoint(self._merged_path(self.settings.merge.free))

    def free_model(self) -> FreeModel:
        """The FREE model as its files say it is."""
        merged = self.free_weights()
        experts = {}
        for task in self.suite.names:
            self._require(self._expert_stage(task))
            experts[task] = load_expert(self._expert_path(task), merged)
        self._require(self._router_stage())
        settings = self.settings.router
        router = Router(len(self.suite.names), self.suite.image_shape[0], settings.grid, settings.hidden)
        router.load_state_dict(load_checkpoint(self._router_stage().path / "router.safetensors"))
        names = {task: self.suite.task(task).class_names for task in self.suite.names}
        return FreeModel(self._backbone(merged), self.heads(), experts, router, names).eval()

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def _loaders(self, split: str) -> dict[str, Any]:
        self.suite.prepare_data()
        self.suite.setup()
        return getattr(self.suite, f"{split}_dataloader")()

    def _label_space(self) -> LabelSpace:
        return LabelSpace({task: self.suite.task(task).num_classes for task in self.suite.names})

    def _evaluate_shared(
        self, weights: Mapping[str, Tensor], heads: Mapping[str, nn.Module], loaders: Mapping[str, Any]
    ) -> dict[str, float]:
        """One backbone for all tasks, each with its own head."""
        return self._evaluate_free(FreeModel(self._backbone(weights), heads), loaders, oracle=True)

    def _evaluate_individual(self, loaders: Mapping[str, Any]) -> dict[str, float]:
        scores, heads = {}, self.heads()
        for task, weights in self.finetuned_weights().items():
            scores |= self._evaluate_shared(weights, heads, {task: loaders[task]})
        return scores

    def _evaluate_free(self, model: FreeModel, loaders: Mapping[str, Any], oracle: bool) -> dict[str, float]:
        device = self._where()
        model = model.eval().to(device)
        return evaluate(
            lambda inputs, task: model(inputs, task=task if oracle else None), loaders, self._label_space(), device
        )

    def _evaluate_router(self, model: FreeModel, loaders: Mapping[str, Any]) -> dict[str, float]:
        """Share of each task's samples that are routed to it: one class per task, whatever their labels."""
        device = self._where()
        tasks = self.suite.names
        space = LabelSpace({"router": len(tasks)})
        scores = {}
        for index, task in enumerate(tasks):
            own = ((inputs, torch.full_like(labels, index)) for inputs, labels in loaders[task])
            scores[task] = evaluate(lambda inputs, _: model.router(inputs), {"router": own}, space, device)["router"]
        return scores

    def _backbone(self, weights: Mapping[str, Tensor]):
        backbone = copy.deepcopy(self.tuner.backbone)
        backbone.load_weights(dict(weights))
        return backbone

    def _where(self) -> torch.device:
        if self._device is None:
            self._device = self.make_trainer(self.folder, {"logger": False}, []).strategy.root_device
        return self._device

    # -- stages and their keys ----------------------------------------------------------------------------------------

    def _key(self, *parts: str) -> dict[str, Any]:
        return {
            "freemerge": freemerge.__version__,
            "seed": self.seed,
            **{part: self.config.get(part) for part in parts},
        }

    def _pretrain_stage(self) -> StageFolder | None:
        if self.tuner.backbone.pretrained or type(self.suite).pretraining is TaskSuite.pretraining:
            return None
        settings = self.settings.pretrain
        inputs = self._key("trainer", "pretrain") | {
            "backbone": _architecture(self.tuner),
            "data": self.suite.fingerprint(selection=False),
            "batch_size": settings.batch_size or self.suite.batch_size,
        }
        if isinstance(inputs["pretrain"], dict):
            inputs["pretrain"] = {key: value for key, value in inputs["pretrain"].items() if key != "cache"}
        stage = StageFolder(self.folder / "pretrain", "pretrain", inputs)
        if settings.cache is None:
            return stage
        return StageFolder(Path(settings.cache) / stage.key[:16], "pretrain", inputs)

    def _base_key(self) -> str:
        stage = self._pretrain_stage()
        return stage.key if stage is not None else hash_tensors(self.tuner.backbone.weights())

    def _finetune_stage(self, task: str) -> StageFolder:
        inputs = self._key("trainer", "finetune", "model") | {
            "base": self._base_key(),
            "task": task,
            "data": self.suite.fingerprint(selection=False),
            "batch_size": self.suite.batch_size,
        }
        return StageFolder(self.folder / "finetune" / task, f"finetune {task}", inputs)

    def _merge_stage(self) -> StageFolder:
        inputs = self._key("merge") | {"models": {task: self._finetune_stage(task).key for task in self.suite.names}}
        return StageFolder(self.folder / "merge", "merge", inputs)

    def _extraction_stage(self) -> StageFolder:
        settings = self.settings.experts
        inputs = self._key() | {
            "merge": self._merge_stage().key,
            "density": settings.density,
            "scope": settings.scope,
            "rescale": settings.rescale,
            "importance": settings.importance,
        }
        if settings.importance != "none":  # then these count too
            inputs |= {
                "batches": settings.importance_batches,
                "batch_size": settings.batch_size or self.suite.batch_size,
                "loss": [settings.feature_weight, settings.logit_weight, settings.temperature],
            }
        return StageFolder(self.folder / "extracted", "experts extracted", inputs)

    def _expert_stage(self, task: str) -> StageFolder:
        inputs = self._key("trainer", "experts") | {
            "task": task,
            "extracted": self._extraction_stage().key,
            "batch_size": self.settings.experts.batch_size or self.suite.batch_size,
        }
        return StageFolder(self.folder / "experts" / task, f"expert {task}", inputs)

    def _router_stage(self) -> StageFolder:
        inputs = self._key("trainer", "router") | {
            "data": self.suite.fingerprint(),
            "batch_size": self.settings.router.batch_size or self.suite.batch_size,
        }
        return StageFolder(self.folder / "router", "router", inputs)

    def _merged_path(self, method: str) -> Path:
        return self._merge_stage().path / f"{method.replace(' ', '_').lower()}.safetensors"

    def _extracted_path(self, task: str) -> Path:
        return self._extraction_stage().path / f"{task}.safetensors"

    def _expert_path(self, task: str) -> Path:
        return self._expert_stage(task).path / "expert.safetensors"

    # -- small things -------------------------------------------------------------------------------------------------

    def _done(self, stage: StageFolder) -> bool:
        record = stage.record() if self.ckpt_path is None else None  # a checkpoint to go on from means: go on
        if record is not None:
            self.console.print(f"[dim]{stage.name}: done already ({record['seconds']:.0f} s then)[/dim]")
        return record is not None

    def _finish(self, stage: StageFolder, results: Mapping[str, Any]) -> None:
        record = stage.finish(results)
        numbers = ", ".join(f"{key} {value:.3f}" for key, value in results.items() if isinstance(value, float))
        self.console.print(f"{stage.name}: {numbers + ', ' if numbers else ''}{record['seconds']:.0f} s")

    def _each_scale(self, what: str) -> Iterable[float]:
        """The grid of scales, with a bar that goes away when it is through."""
        quiet = not self.console.is_terminal
        return track(self.settings.merge.scales, what, console=self.console, transient=True, disable=quiet)

    def _say(self, what: str, accuracy: float) -> None:
        self.console.print(f"{what}: val acc {accuracy:.3f}")

    def _require(self, stage: StageFolder) -> dict[str, Any]:
        record = stage.record()
        if record is None:
            name = stage.name.split()[0].rstrip("s") + ("s" if stage.name.startswith("expert") else "")
            raise ValueError(
                f"{self.folder}: stage {stage.name!r} has not been done with this configuration; "
                f"add {name} to run.stages"
            )
        return record

    def _require_folder(self, stage: StageFolder) -> Path:
        self._require(stage)
        return stage.path

    def _fit(
        self,
        stage: StageFolder,
        module: L.LightningModule,
        data: L.LightningDataModule,
        overrides: Mapping[str, Any],
        resume: Path | None,
        monitor: str,
    ) -> L.Trainer:
        """One Trainer fit, resumed if it was interrupted; prints what it is fitting."""
        checkpoint = ModelCheckpoint(
            dirpath=stage.checkpoints,
            filename="best",
            monitor=monitor,
            mode="max",
            save_last=True,
            enable_version_counter=False,
        )
        trainer = self.make_trainer(stage.path, dict(overrides), [checkpoint])
        ckpt_path = str(resume) if resume else None
        self.console.print(f"[bold]{stage.name}[/bold]" + (f" [dim](from {ckpt_path})[/dim]" if ckpt_path else ""))
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        if trainer.interrupted:
            raise KeyboardInterrupt
        return trainer

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if rank_zero_only.rank == 0:
            save_checkpoint(path, {name: tensor.detach().cpu() for name, tensor in tensors.items()})

    def _file_size(self, path: Path) -> int:
        return path.stat().st_size

    def _seed(self, stage: StageFolder) -> None:
        digest = hashlib.sha256(f"{self.seed}:{stage.name}".encode()).digest()
        L.seed_everything(int.from_bytes(digest[:4], "big"), workers=True, verbose=False)


def _metric(trainer: L.Trainer, name: str) -> float | None:
    value = trainer.callback_metrics.get(name)
    return float(value) if value is not None else None


def _architecture(tuner: FineTuner) -> str:
    """A hash of the untrained backbone: names, shapes and starting values of all its weights."""
    return hash_tensors(tuner.backbone.weights())
