"""Fits, callbacks and merges under every strategy, on whatever devices there are.

    python tools/check_gpu.py                        # everything; rows that need a GPU are skipped where there is none
    python tools/check_gpu.py --only cpu-ddp gpu-ddp

Every case is a process of its own (with one more per further rank): a small network is fine-tuned with all callbacks
that its strategy allows, and what they wrote is compared with what one process makes of the same weights. Prints a
table; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "callbacks")]
TIMEOUT = 300  # seconds for a case
JUMPING = 1e-5  # share of a tensor's entries
METHODS = [
    "TaskArithmetic(0.3)", "WeightAverage()", "FRMerging()", "FRMerging(coefficients='mean')",
    "FRMerging(HighPass(0.2))", "FRMerging(Butterworth(0.1))", "PCBMerging()", "PCBMerging(inter='pairwise')",
    "PCBMerging(scope='tensor')", "PCBMerging(filter=NyquistDisc())", "Ties()", "Ties(scope='tensor')", "Dare(Ties())",
    "Breadcrumbs()", "EMRMerging()", "TSVMerge()", "IsoC()",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One fit; or merges where `strategy` is "merge", or routed models where it is "free".

    Args:
        name: how it is called on the command line.
        strategy: the Trainer's.
        accelerator: "cpu" or "cuda".
        ranks: how many devices; 0 for all GPUs.
        precision: the Trainer's.
    """

    name: str
    strategy: str
    accelerator: str
    ranks: int = 1
    precision: str = "32-true"

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only its part of the weights."""
        return self.strategy in ("fsdp", "model_parallel")


CASES = [
    Case("cpu-single", "auto", "cpu"),
    Case("cpu-bf16", "auto", "cpu", precision="bf16-mixed"),
    Case("cpu-ddp", "ddp", "cpu", 2),
    Case("cpu-spawn", "ddp_spawn", "cpu", 2),
    Case("cpu-model-parallel", "model_parallel", "cpu", 2),
    Case("gpu-single", "auto", "cuda"),
    Case("gpu-bf16", "auto", "cuda", precision="bf16-mixed"),
    Case("gpu-ddp", "ddp", "cuda", 0),
    Case("gpu-spawn", "ddp_spawn", "cuda", 0),
    Case("gpu-fsdp", "fsdp", "cuda", 0),
    Case("gpu-model-parallel", "model_parallel", "cuda", 0),
    Case("gpu-ddp-bf16", "ddp", "cuda", 0, "bf16-mixed"),
    Case("gpu-model-parallel-bf16", "model_parallel", "cuda", 0, "bf16-mixed"),
    Case("gpu-merge", "merge", "cuda"),
    Case("gpu-free", "free", "cuda"),
    Case("gpu-free-bf16", "free", "cuda", precision="bf16-mixed"),
]


def run_case(case: Case, folder: Path) -> None:
    """Run one case and write `results.json`: check → "ok" or what was found."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if case.strategy in ("merge", "free"):
        checks = merge_checks(case, folder) if case.strategy == "merge" else free_checks(case)
        results = dict(attempt(*check) for check in checks)
    else:
        fit(case, folder)
        if int(os.environ.get("LOCAL_RANK", 0)) != 0:
            return  # another rank, started by Lightning
        results = dict(attempt(*check) for check in fit_checks(case, folder))
    (folder / "results.json").write_text(json.dumps(results))


def attempt(name: str, check) -> tuple[str, str]:
    """A check's name, and "ok" or the error that it raised."""
    try:
        check()
    except Exception as error:
        return name, f"{type(error).__name__}: {error}"
    return name, "ok"


def fit(case: Case, folder: Path) -> None:
    """Fine-tune with all callbacks that the strategy allows."""
    import check_gpu_project as parts
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy

    from freemerge.checkpoints import save_checkpoint
    from freemerge.merging import FRMerging
    from freemerge_callbacks import MergeAtFitEnd, MergePreview, MultiTaskEvaluation, TaskCheckpoint

    L.seed_everything(0, verbose=False)
    base, other = str(folder / "base.safetensors"), str(folder / "other.safetensors")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        save_checkpoint(base, parts.make_backbone().state_dict())
        save_checkpoint(other, parts.make_finetuned())
    heads, loaders = parts.make_heads(), parts.make_loaders()
    merger = MergeAtFitEnd(FRMerging(), [other], str(folder / "merged.safetensors"))
    callbacks = [
        parts.DriftApart(),
        TaskCheckpoint(str(folder / "task.safetensors"), task="a", head=None),
        merger,
        MergeAtFitEnd(FRMerging(), [other], str(folder / "best.safetensors"), weights="best"),
        ModelCheckpoint(dirpath=folder / "checkpoints", monitor="age", mode="max"),  # the last is the best
        parts.SaveWeights(str(folder / "trained.pt")),
    ]
    if not case.sharded:
        preview = MergePreview(FRMerging(), base, [other], loaders, heads=heads)
        callbacks += [preview, MultiTaskEvaluation(loaders, heads=heads, merged=merger)]
    trainer = L.Trainer(
        accelerator=case.accelerator,
        devices=case.ranks or torch.cuda.device_count(),
        strategy=ModelParallelStrategy() if case.strategy == "model_parallel" else case.strategy,
        precision=case.precision,
        callbacks=[*callbacks, parts.SaveResults(str(folder / "results")), parts.LeaveTogether()],
        max_epochs=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        parts.Sharded() if case.strategy == "model_parallel" else parts.Small(),
        parts.make_loader(61),
        parts.make_loader(16),
    )


def fit_checks(case: Case, folder: Path) -> Iterator[tuple]:
    """What must hold after a fit."""
    import check_gpu_project as parts
    import torch

    from freemerge.checkpoints import hash_tensors, load_checkpoint
    from freemerge.checkpoints.task_files import read_record
    from freemerge.merging import FRMerging, merge

    base = load_checkpoint(folder / "base.safetensors")
    trained = torch.load(folder / "trained.pt", weights_only=True)

    def trained_at_all() -> None:
        assert any(not torch.equal(trained[name], base[name]) for name in base), "the weights did not change"

    def identical() -> None:
        models = {"own": trained, "other": folder / "other.safetensors"}
        merge(base, models, FRMerging(), output=folder / "one.safetensors", overwrite=True)
        one, several = ((folder / f"{name}.safetensors").read_bytes() for name in ("one", "merged"))
        assert one == several, "the merged file differs from that of one process"

    def shared() -> None:
        found = [torch.load(path, weights_only=True)["ranks"] for path in sorted(folder.glob("results.[0-9]*"))]
        assert found == [len(found)] * len(found), f"{len(found)} ranks, and {found} of them shared the merge"

    def best() -> None:
        last, best = ((folder / f"{name}.safetensors").read_bytes() for name in ("merged", "best"))
        assert last == best, "the weights of the checkpoint are not those that the fit ended with"

    def recorded() -> None:
        assert read_record(folder / "task.safetensors").base_hash == hash_tensors(base), "another hash of the base"
        kept = load_checkpoint(folder / "task.safetensors")
        assert all(torch.equal(kept[f"backbone.{name}"], trained[name]) for name in base), "other weights"

    def exact() -> None:
        backbone = parts.make_backbone().eval()
        backbone.load_state_dict(load_checkpoint(folder / "merged.safetensors"))
        heads, files = parts.make_heads(), sorted(folder.glob("results.[0-9]*"))
        # Another device or precision may see a sample on the other side of a boundary.
        slack = 0 if (case.accelerator, case.precision) == ("cpu", "32-true") else 1
        for path in files:
            found = torch.load(path, weights_only=True)
            for name, results in ((name, found[name]) for name in ("MultiTaskEvaluation", "MergePreview")):
                for task, loader in parts.make_loaders().items():
                    right = sum(int((heads[task](backbone(x)).argmax(1) == y).sum()) for x, y in loader)
                    count = results[task] * parts.SIZES[task]
                    assert abs(count - round(count)) < 1e-3, f"{name}: {task}: {count} samples"
                    assert abs(count - right) < slack + 1e-3, f"{name}: {task}: {count:.0f} right, expected {right}"

    yield "trains", trained_at_all
    yield "merged file = one process's", identical
    yield "merge shared by all ranks", shared
    yield "merged from ModelCheckpoint", best
    yield "task file, hash of the base", recorded
    if not case.sharded:
        yield "metrics exact", exact


def merge_checks(case: Case, folder: Path) -> Iterator[tuple]:
    """What must hold of a merge on a device: the same as on the CPU, up to rounding."""
    import torch

    from freemerge import merging
    from freemerge.checkpoints import load_checkpoint, save_checkpoint

    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (192, 2304), "square": (768, 768), "high": (3072, 768), "odd": (33, 65, 3), "bias": (768,)}
    # Larger than what a GPU computes with at a time, and than what is partitioned in memory.
    shapes["vocabulary"] = (9000, 768)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base["half"], base["steps"] = base["square"].bfloat16(), torch.tensor(7)

    def finetuned(value: torch.Tensor) -> torch.Tensor:
        change = 0.02 * torch.randn(value.shape, generator=generator)
        return value + change.to(value.dtype) if value.is_floating_point() else value

    models = {label: {name: finetuned(value) for name, value in base.items()} for label in "abc"}
    everything = {"base": base, **models}
    paths = {label: folder / f"{label}.safetensors" for label in everything}
    for label, tensors in everything.items():
        save_checkpoint(paths[label], tensors)
    moved = {
        label: {name: value.to(case.accelerator) for name, value in tensors.items()}
        for label, tensors in everything.items()
    }

    def merge(models: dict, method, **options):
        return merging.merge(models["base"], {label: models[label] for label in "abc"}, method, **options)

    def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        assert list(found) == list(expected), "other tensors"
        for name, value in expected.items():
            assert found[name].dtype == value.dtype, f"{name} has dtype {found[name].dtype}"
            if not value.is_floating_point():
                assert torch.equal(found[name].cpu(), value), f"{name} was not kept"
                continue
            change = (value.float() - base[name].float()).norm()  # what is merged, without what is not
            differences = (found[name].cpu().float() - value.float()).abs().flatten().sort().values
            # Rounding may put an entry on the other side of a threshold, where some methods jump.
            error = differences[: max(1, round(len(differences) * (1 - JUMPING)))].norm() / change
            limit = 1e-4 if value.dtype == torch.float32 else 1e-2
            assert error < limit, f"{name} differs by {float(error):.1e} of what the merge changed"

    def same(method) -> None:
        on_cpu = merge(everything, method)
        compare(merge(everything, method, device=case.accelerator), on_cpu)
        there = merge(moved, method)
        assert all(value.device.type == case.accelerator for value in there.values()), "left the device"
        compare(there, on_cpu)
        output = folder / "merged.safetensors"
        merge(paths, method, device=case.accelerator, output=output, overwrite=True)
        compare({name: load_checkpoint(output)[name] for name in on_cpu}, on_cpu)

    for text in METHODS:
        yield f"{text} on the GPU", lambda text=text: same(eval(text, vars(merging)))


def free_checks(case: Case) -> Iterator[tuple]:
    """What must hold of a routed model on a device: it answers as on the CPU, and its weights come back."""
    import copy

    import torch
    from torch import nn

    from freemerge.experts import extract, extract_low_rank
    from freemerge.models import EarlyRouter, FreeModel, TransformersBackbone, feature_width

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    images = {"pixel_values": torch.randn(45, 3, 32, 32)}
    tokens = torch.randint(5, 90, (45, 12)).sort(dim=1, descending=True).values
    texts = {"input_ids": tokens, "attention_mask": (tokens > 20).long()}
    configs = {
        "images": ({"model_type": "vit", "image_size": 32, "patch_size": 8, **shape}, images["pixel_values"]),
        "texts": ({"model_type": "bert", "vocab_size": 100, **shape}, texts),
    }

    def make(kind: str, config: dict, inputs, top_n: int) -> FreeModel:
        backbone = TransformersBackbone(config=config, pooling="mean").eval()
        noise = [{name: 0.02 * torch.randn(t.shape) for name, t in backbone.weights().items()} for _ in range(3)]
        some = [extract(one, 0.05) if kind == "sparse" else extract_low_rank(one, rank=2) for one in noise]
        experts = dict(zip("abc", some, strict=True))
        router = EarlyRouter(4, "embeddings", feature_width(inputs, backbone, "embeddings")).eval()
        heads = {task: nn.Linear(shape["hidden_size"], 5) for task in "abcd"}
        model = FreeModel(backbone, heads, experts, router, top_n=top_n).eval()
        with torch.no_grad():  # untrained, it would send everything to one task
            router.head.weight *= 30
            router.head.bias -= model.route(inputs)[0].mean(0)
        return model

    def select(inputs, count: int, device: str):
        cut = {name: tensor[:count].to(device) for name, tensor in inputs.items()} if isinstance(inputs, dict) else None
        return inputs[:count].to(device) if cut is None else cut

    @torch.no_grad()
    def same(kind: str, config: dict, inputs, top_n: int) -> None:
        on_cpu = make(kind, config, inputs, top_n)
        model = copy.deepcopy(on_cpu).to(case.accelerator)
        before = {name: tensor.clone() for name, tensor in model.backbone.weights().items()}
        narrow = torch.autocast(case.accelerator, torch.bfloat16, enabled=case.precision != "32-true")
        limit = 1e-3 if case.precision == "32-true" else 5e-2
        with narrow:
            for count in (45, 45, 44, 45, 1, 7, 1, 45):
                for task in (None, "a", "d"):
                    found = model(select(inputs, count, case.accelerator), task=task)
                    # Narrow numbers may route a sample elsewhere: it is compared with what it was routed to.
                    groups = {task} if task else set(found.task_names)
                    for name in groups:
                        own = torch.tensor([each == name for each in found.task_names])
                        expected = on_cpu(select(inputs, count, "cpu"), task=name).logits
                        if top_n > 1 and task is None:
                            expected = on_cpu(select(inputs, count, "cpu")).logits
                        errors = (found.logits.cpu().float() - expected).norm(dim=1) / expected.norm(dim=1)
                        # A sample's mixture is rounded to sixteenths, and may be rounded the other way.
                        near = errors[own].sort().values[: max(1, int(0.8 * own.sum()))] if top_n > 1 else errors[own]
                        assert near.max() < limit, f"{count} inputs, task {task}: differs by {float(near.max()):.1e}"
                    assert task or len(groups) > 1 or count < 44, f"all went to {groups}"
        for name, tensor in model.backbone.weights().items():
            assert torch.equal(tensor, before[name]), f"{name} did not come back"

    for kind in ("sparse", "low_rank"):
        for what, (config, inputs) in configs.items():
            for top_n in (1, 2):
                name = f"{kind} experts, {what}, top {top_n}"
                yield name, lambda args=(kind, config, inputs, top_n): same(*args)


def run(case: Case) -> tuple[dict[str, str], float]:
    """Run a case in processes of its own: its results, and seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="check_gpu.") as folder:
        command = [sys.executable, __file__, "--case", case.name, "--folder", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            said = f"not done after {TIMEOUT} s"
        path = Path(folder) / "results.json"
        results = json.loads(path.read_text()) if path.exists() else {"runs": said}
    return results, time.monotonic() - began


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="some of the cases")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(next(case for case in CASES if case.name == arguments.case), arguments.folder)
        return 0

    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    gpus = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(gpus)}))
    title = f"torch {torch.__version__}, {gpus or 'no'} GPU{'s' * (gpus > 1)} {names}".strip()
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("check", "strategy", "devices", "precision", "result"):
        table.add_column(column, overflow="fold")
    table.add_column("seconds", justify="right")
    failed = False
    with Console(stderr=True).status("") as status:
        for case in CASES:
            if arguments.only and case.name not in arguments.only:
                continue
            status.update(case.name)
            devices = f"{case.ranks or gpus} × {case.accelerator}"
            about = [case.strategy, devices, case.precision]
            if case.accelerator == "cuda" and not gpus:
                table.add_row("all", case.strategy, "cuda", case.precision, "skipped: no GPU", "")
                continue
            results, seconds = run(case)
            for index, (check, result) in enumerate(results.items()):
                failed |= result != "ok"
                colour = "green" if result == "ok" else "red"
                table.add_row(check, *about, f"[{colour}]{result}", f"{seconds:.1f}" if index == 0 else "")
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
