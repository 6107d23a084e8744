"""Accuracy against bytes on disk: experts of every kind and size, and their rivals, on the same fine-tuned checkpoints.

    python -m freemerge fit --config configs/vision8.yaml --data.folder DATA --model.backbone.weights WEIGHTS \\
        --run.folder RUN --run.stages "[finetune]"
    python tools/benchmark_experts.py --run RUN --data DATA --weights WEIGHTS

DATA is a folder of NPZ files, one per task; WEIGHTS is EtinyNet's safetensors file; the first command, needed once,
makes the checkpoints. Scales of merged backbones and of extracted experts are chosen on validation data, by one grid;
every row is then measured once on test data. Rows are kept in RUN/experts.json as they are measured, and measured ones
are skipped, so that an interrupted run goes on. RUN/experts.png is the picture.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from etinynet import EtinyNetBackbone
from torch import Tensor, nn

from freemerge.checkpoints import load_checkpoint, save_checkpoint
from freemerge.data import NpzSuite
from freemerge.evaluation import LabelSpace, evaluate, evaluate_routing
from freemerge.experts import (
    STATISTICS,
    Expert,
    emr_experts,
    extract,
    extract_low_rank,
    load_expert,
    save_expert,
)
from freemerge.merging import (
    FRMerging,
    MergeMethod,
    TaskArithmetic,
    Ties,
    apply_task_vector,
    merge_task_vectors,
    task_vector,
)
from freemerge.merging.patterns import select
from freemerge.models import ConvRouter, FreeModel, choose_threshold
from freemerge.training import ExpertTrainer, RouterTrainer

SCALES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
MERGES: dict[str, MergeMethod] = {"task arithmetic": TaskArithmetic(1.0), "TIES": Ties(), "FR": FRMerging()}
Experts = dict[str, Expert]


class Benchmark:
    """One run's checkpoints, and everything that is measured on them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.run = Path(arguments.run)
        self.suite = NpzSuite(
            arguments.data,
            tasks=arguments.tasks,
            image_size=32,
            channels=3,
            mean=128 / 255,
            std=1 / 255,
            batch_size=arguments.batch_size,
            val_size=arguments.val_size,
            test_size=arguments.test_size,
            seed=arguments.seed,
        )
        self.suite.setup()
        self.tasks = self.suite.names
        self.space = LabelSpace({task: self.suite.task(task).num_classes for task in self.tasks})
        self.base = load_checkpoint(self.run / "base.safetensors")
        self.tuned = {
            task: load_checkpoint(self.run / "finetune" / task / "backbone.safetensors") for task in self.tasks
        }
        learnt = select(self.base, None, STATISTICS)
        self.vectors = {
            task: {name: vector[name] for name in learnt if name in vector}
            for task, vector in ((task, task_vector(self.base, weights)) for task, weights in self.tuned.items())
        }
        self.results = self.run / "experts.json"
        self.rows: dict[str, Any] = json.loads(self.results.read_text()) if self.results.exists() else {}

    # -- measuring ----------------------------------------------------------------------------------------------------

    def backbone(self, weights: Mapping[str, Tensor]) -> EtinyNetBackbone:
        """The backbone with these weights."""
        backbone = EtinyNetBackbone(self.arguments.weights, self.arguments.image_size)
        backbone.load_weights(dict(weights))
        return backbone.eval()

    def heads(self) -> dict[str, nn.Linear]:
        """Task → head."""
        heads = {}
        for task in self.tasks:
            state = load_checkpoint(self.run / "finetune" / task / "head.safetensors")
            heads[task] = nn.Linear(*reversed(state["weight"].shape))
            heads[task].load_state_dict(state)
        return heads

    def score(
        self, model: FreeModel, split: str, routed: bool = False, tasks: tuple[str, ...] = ()
    ) -> dict[str, float]:
        """Task → accuracy."""
        loaders = getattr(self.suite, f"{split}_dataloader")()
        loaders = {task: loaders[task] for task in tasks or self.tasks}
        return evaluate(lambda inputs, task: model(inputs, None if routed else task), loaders, self.space)

    def model(self, weights: Mapping[str, Tensor], experts: Mapping[str, Expert] | None = None) -> FreeModel:
        """A FREE model without a router."""
        return FreeModel(self.backbone(weights), self.heads(), experts).eval()

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure a row unless it is there; print it."""
        if name not in self.rows:
            self.rows[name] = measure()
            self.results.write_text(json.dumps(self.rows, indent=2) + "\n")
        row = self.rows[name]
        scores = row["scores"]
        average = sum(scores.values()) / len(scores)
        best = self.rows["individual"]["scores"] if "individual" in self.rows else scores
        kept = average / (sum(best.values()) / len(best))
        each = " ".join(f"{100 * score:5.1f}" for score in scores.values())
        print(f"{name:42} {row.get('bytes', 0):8d} B/task {100 * average:6.2f} {100 * kept:6.2f} %  {each}", flush=True)
        return row

    # -- backbones ----------------------------------------------------------------------------------------------------

    def merged(self, name: str) -> dict[str, Tensor]:
        """The backbone merged by a method, at the scale that does best on validation data; kept in the run's folder."""
        path = self.run / "benchmark" / f"{name.replace(' ', '_')}.safetensors"
        if not path.exists():
            vector = merge_task_vectors(list(self.vectors.values()), MERGES[name])
            found = {}
            for scale in SCALES:
                scores = self.score(self.model(apply_task_vector(self.base, vector, scale)), "val")
                found[scale] = sum(scores.values()) / len(scores)
            best = max(found, key=found.get)
            save_checkpoint(path, apply_task_vector(self.base, vector, best), {"scale": repr(best)})
            print(f"  {name}: scale {best} of {found}", flush=True)
        return load_checkpoint(path)

    @cached_property
    def free(self) -> dict[str, Tensor]:
        """The merged backbone that carries our experts: the best on validation data."""
        scores = {name: sum(self.score(self.model(self.merged(name)), "val").values()) for name in MERGES}
        best = max(scores, key=scores.get)
        print(f"  experts live on {best}", flush=True)
        return self.merged(best)

    # -- experts ------------------------------------------------------------------------------------------------------

    def measured(self, weights: Mapping[str, Tensor], experts: Experts, shared: int = 0) -> dict[str, Any]:
        """A row of experts: their bytes, and accuracies with what the files give back."""
        sizes, loaded = [], {}
        for task, expert in experts.items():
            path = save_expert(self.run / "benchmark" / "expert.safetensors", expert)
            sizes.append(path.stat().st_size)
            loaded[task] = load_expert(path, shared=getattr(expert, "shared", None))
        scores = self.score(self.model(weights, loaded), "test")
        return {"scores": scores, "bytes": round(sum(sizes) / len(sizes)), "shared_bytes": shared}

    def scaled(self, weights: Mapping[str, Tensor], experts: Experts) -> Experts:
        """Extracted experts at the scale that does best on validation data."""
        found = {}
        for scale in (0.5, 0.7, 1.0, 1.4):
            scores = self.score(self.model(weights, {t: e.scaled(scale) for t, e in experts.items()}), "val")
            found[scale] = sum(scores.values())
        best = max(found, key=found.get)
        return {task: expert.scaled(best) for task, expert in experts.items()}

    def trained(self, kind: str, density: float) -> Experts:
        """Our experts: extracted from the residual, then trained against the teacher; kept in the run's folder."""
        experts = {}
        for task in self.tasks:
            path = self.run / "benchmark" / f"{kind} {density}" / f"{task}.safetensors"
            if not path.exists():
                L.seed_everything(self.arguments.seed, verbose=False)
                residual = task_vector(self.free, self.tuned[task])
                if kind == "sparse":
                    start, lr = extract(residual, density), self.arguments.lr
                else:
                    start = extract_low_rank(residual, density=density, vectors=self.arguments.vectors)
                    lr = self.arguments.low_rank_lr
                module = ExpertTrainer(
                    self.backbone(self.free),
                    self.heads()[task],
                    self.tuned[task],
                    start,
                    optimizer=partial(torch.optim.Adam, lr=lr, betas=(0.9, 0.98)),
                    cache_teacher=True,
                )
                self._trainer(self.arguments.epochs).fit(module, self.suite.for_task(task))
                save_expert(path, module.expert)
            experts[task] = load_expert(path)
        return experts

    def router(self) -> tuple[ConvRouter, float]:
        """The router and its threshold; kept in the run's folder."""
        path = self.run / "benchmark" / "router.safetensors"
        router = ConvRouter(len(self.tasks), 3)
        if not path.exists():
            L.seed_everything(self.arguments.seed, verbose=False)
            module = RouterTrainer(router, optimizer=lambda weights: torch.optim.AdamW(weights, lr=3e-3))
            mixture = self.suite.mixture(batch_size=64)
            self._trainer(self.arguments.router_epochs).fit(module, mixture)
            threshold = choose_threshold(module.logits(mixture.val_dataloader()))
            save_checkpoint(path, {**router.state_dict(), "threshold": torch.tensor(threshold)})
        state = load_checkpoint(path)
        threshold = float(state.pop("threshold"))
        router.load_state_dict(state)
        return router.eval(), threshold

    def _trainer(self, epochs: int) -> L.Trainer:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        return L.Trainer(max_epochs=epochs, limit_val_batches=0, default_root_dir=self.run, **quiet)

    # -- all of it ----------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """All rows."""
        size = sum(tensor.nbytes for tensor in self.base.values() if tensor.is_floating_point())
        print(f"{', '.join(self.tasks)}; a backbone is {size} bytes, one per cent is {size // 100}")
        self.row("individual", lambda: {"scores": self._individual(), "bytes": size})
        self.row("base", lambda: {"scores": self.score(self.model(self.base), "test")})
        for name in MERGES:
            self.row(name, lambda name=name: {"scores": self.score(self.model(self.merged(name)), "test")})
        self.row("EMR", self._emr)
        for rank in self.arguments.twin_ranks:
            self.row(f"Twin, rank {rank}", partial(self._twin, rank))
        for density in self.arguments.densities:
            self.row(f"FREE as released, {density}", partial(self._released, density))
            self.row(f"ours extracted, sparse {density}", partial(self._extracted, "sparse", density))
        for density in self.arguments.low_rank_densities:
            self.row(f"ours extracted, low-rank {density}", partial(self._extracted, "low-rank", density))
        sizes = [("sparse", density) for density in self.arguments.densities]
        for kind, density in sizes + [("low-rank", density) for density in self.arguments.low_rank_densities]:
            name = f"ours trained, {kind} {density}"
            trained = self.row(name, partial(self._trained, kind, density))
            self.row(f"{name}, routed", partial(self._routed, kind, density, trained["bytes"]))
        self.plot(size)

    def _emr(self) -> dict[str, Any]:
        shared, experts = emr_experts(self.vectors)
        return self.measured(self.base, experts, sum(tensor.nbytes for tensor in shared.values()))

    def _twin(self, rank: int) -> dict[str, Any]:
        merged = self.merged("task arithmetic")
        residuals = {task: task_vector(merged, weights) for task, weights in self.tuned.items()}
        return self.measured(merged, {task: extract_low_rank(r, rank=rank) for task, r in residuals.items()})

    def _released(self, density: float) -> dict[str, Any]:
        cut = partial(extract, density=density, scope="row", rescale="released")
        return self.measured(self.merged("FR"), {task: cut(vector) for task, vector in self.vectors.items()})

    def _extracted(self, kind: str, density: float) -> dict[str, Any]:
        cut = partial(extract if kind == "sparse" else extract_low_rank, density=density)
        experts = {task: cut(task_vector(self.free, weights)) for task, weights in self.tuned.items()}
        return self.measured(self.free, self.scaled(self.free, experts))

    def _individual(self) -> dict[str, float]:
        scores = {}
        for task, weights in self.tuned.items():
            scores |= self.score(self.model(weights), "test", tasks=(task,))
        return scores

    def _trained(self, kind: str, density: float) -> dict[str, Any]:
        return self.measured(self.free, self.trained(kind, density))

    def _routed(self, kind: str, density: float, expert_bytes: int) -> dict[str, Any]:
        router, threshold = self.router()
        experts = self.trained(kind, density)
        model = FreeModel(self.backbone(self.free), self.heads(), experts, router, threshold=threshold).eval()
        routing = evaluate_routing(model, self.suite.test_dataloader())
        size = (self.run / "benchmark" / "router.safetensors").stat().st_size // len(self.tasks)
        scores = self.score(model, "test", routed=True)
        return {"scores": scores, "bytes": expert_bytes + size, "routing": routing.as_dict()}

    def plot(self, size: int) -> None:
        """Average accuracy against bytes per task."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter

        groups: dict[str, list[tuple[float, float]]] = {}
        for name, row in self.rows.items():
            if row.get("bytes") and name != "individual" and "routed" not in name:
                label = name.rstrip("0123456789.").removesuffix(", rank ").rstrip(", ")
                average = 100 * sum(row["scores"].values()) / len(row["scores"])
                groups.setdefault(label, []).append((100 * row["bytes"] / size, average))
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for marker, (label, points) in zip("osD^vP*X", groups.items(), strict=False):
            axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=label)
        for name, style in (("individual", "-"), ("base", ":"), ("task arithmetic", "--")):
            scores = self.rows[name]["scores"].values()
            axes.axhline(100 * sum(scores) / len(scores), color="0.4", linestyle=style, linewidth=1, label=name)
        axes.axvline(1.0, color="0.8", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bytes of a task's file, in % of one backbone")
        axes.set_ylabel("mean test accuracy (%), oracle routing")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(self.run / "experts.png", dpi=150)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True, help="folder with base.safetensors and finetune/<task>/")
    parser.add_argument("--data", required=True, help="folder of NPZ files")
    parser.add_argument("--weights", required=True, help="EtinyNet's safetensors file")
    parser.add_argument("--tasks", nargs="*", default=None)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--val-size", type=int, default=None, help="so many validation images of each task")
    parser.add_argument("--test-size", type=int, default=None, help="so many test images of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5, help="of each expert's training")
    parser.add_argument("--lr", type=float, default=1e-2, help="of sparse experts")
    parser.add_argument("--low-rank-lr", type=float, default=3e-3)
    parser.add_argument("--router-epochs", type=int, default=5)
    parser.add_argument("--densities", type=float, nargs="*", default=[0.005, 0.01, 0.019, 0.04])
    parser.add_argument("--low-rank-densities", type=float, nargs="*", default=[0.02, 0.04])
    parser.add_argument("--vectors", choices=["whole", "none"], default="none", help="of low-rank experts")
    parser.add_argument("--twin-ranks", type=int, nargs="*", default=[1, 2, 4])
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    Benchmark(parser.parse_args()).measure()


if __name__ == "__main__":
    main()
