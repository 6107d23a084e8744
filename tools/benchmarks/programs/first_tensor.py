"""Print the time when task arithmetic has merged its first tensor: `first <time.monotonic()>`.

    python first_tensor.py python '{"base": …, …}'      as merge_models.py
    python first_tensor.py command --base … --method …  as `python -m freemerge merge`

The time is taken when the engine's first call of a function of the method returns.
"""

import functools
import runpy
import sys
import time
from pathlib import Path

from freemerge.merging import TaskArithmetic

kind = sys.argv.pop(1)
seen = []


def stamped(verb):
    @functools.wraps(verb)
    def call(*arguments, **keywords):
        result = verb(*arguments, **keywords)
        if not seen:
            seen.append(time.monotonic())
            print(f"first {seen[0]}", flush=True)
        return result

    return call


for name in dir(TaskArithmetic):
    if name.startswith("combine"):
        setattr(TaskArithmetic, name, stamped(getattr(TaskArithmetic, name)))

if kind == "python":
    runpy.run_path(str(Path(__file__).with_name("merge_models.py")), run_name="__main__")
else:
    sys.argv.insert(1, "merge")
    runpy.run_module("freemerge", run_name="__main__", alter_sys=True)
