"""Kill a tiny run at random moments, then compare its results, bit for bit, with those of an undisturbed run.

The run's folder is moved after each kill, and a task is added on the way.

    python tools/check_killed_runs.py --kills 50

Each attempt is killed after a random time, except the last, which finishes. The exit code is 1 if a tensor or the
report differs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from freemerge.cli import main  # noqa: E402
from freemerge.pipeline import content_hash  # noqa: E402
from tests.pipeline.killed import attempt  # noqa: E402
from tests.tiny import VIT  # noqa: E402

CONFIG = {
    "trainer": {"max_epochs": 6},
    "model": {
        "init_args": {
            "backbone": {
                "init_args": {"config": {**VIT, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}}
            }
        }
    },
    "data": {"class_path": "tests.pipeline.killed.AugmentedSuite"},
    "merge": {"methods": {"FR": {"class_path": "FRMerging"}}},
    "finetune": {"weights": "best"},
    "experts": {"mixup": 0.2},
    "run": {"checkpoint_steps": 1},
}


def run(kills: int, seed: int, folder: Path) -> tuple[int, list[str]]:
    """The number of kills, and the files that differ from those of an undisturbed run."""
    torch.set_num_threads(1)
    config, chance = folder / "more.yaml", random.Random(seed)
    config.write_text(yaml.safe_dump(CONFIG))
    arguments = ["fit", "--config", str(ROOT / "tests" / "tiny.yaml"), "--config", str(config), "--run.folder"]
    whole, place = folder / "whole", folder / "run"
    if main([*arguments, str(whole)]) != 0:
        raise SystemExit("the undisturbed run failed")
    one_task = ["--data.tasks", "[corners]", "--run.stages", "[pretrain, finetune, merge]"]
    killed = 0
    while killed < kills:
        first = one_task if killed < kills // 2 else []
        code = attempt([*arguments, str(place), *first], 0.2 + 1.5 * chance.random())
        if code not in (0, None):
            raise SystemExit(f"attempt {killed} ended with code {code}")
        if code == 0:  # it finished before it was killed: remove a stage, so that the next kills come earlier
            chosen = chance.choice(
                ["finetune/corners", "merge"] if first else ["finetune/bars", "experts/bars", "router"]
            )
            shutil.rmtree(place / chosen, ignore_errors=True)
            continue
        killed += 1
        if place.exists():
            moved = folder / f"moved{killed}"
            shutil.move(place, moved)
            place = moved
    if attempt([*arguments, str(place)], None) != 0:
        raise SystemExit("the run failed at its end")
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    differing = [str(file) for file in files if content_hash(whole / file) != content_hash(place / file)]
    if (whole / "report.json").read_text() != (place / "report.json").read_text():
        differing.append("report.json")
    print(f"{len(files)} files of tensors and the report compared")
    return killed, differing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        count, different = run(given.kills, given.seed, Path(name))
    print(f"killed {count} times; " + (f"differing: {', '.join(different)}" if different else "the same to the bit"))
    sys.exit(1 if different else 0)
