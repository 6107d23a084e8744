"""Merge models in a device's memory, and compare with a copy within it; prints JSON.

    python on_device.py '{"case": "vit", "small": false, "methods": {…}, "device": "cuda", "repeat": 3}'

The device generates the models. Prints
`{"copy": GB/s, "bytes": of all inputs and the output, "seconds": {method: median}}`.
The copy counts what it reads and what it writes, as a merge does.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from freemerge import merging
from freemerge.runtime import own_process

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.models import draw_model, llama, small, vit

own_process()
job = json.loads(sys.argv[1])
device = torch.device(job["device"])


def seconds(action):
    """Median of `repeat` runs, after a warm-up run."""
    times = []
    for _ in range(job["repeat"] + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


case = {"vit": vit, "llama": llama}[job["case"]]()
case = small(case) if job["small"] else case
base, *models = (draw_model(case, index, job["device"]) for index in range(-1, case.models))
size = sum(tensor.nbytes for tensor in base.values())
source = torch.empty(min(size, 1 << 30), dtype=torch.uint8, device=device)
target = torch.empty_like(source)
found = {name: eval(text, vars(merging)) for name, text in job["methods"].items()}
result = {
    "copy": 2 * source.numel() / seconds(lambda: target.copy_(source)) / 1e9,
    "bytes": size * (len(models) + 2),
    "seconds": {
        name: seconds(lambda method=method: merging.merge(base, models, method)) for name, method in found.items()
    },
}
print(json.dumps(result))
