"""Print the seconds of opening models and of planning their merge: `<opening> <planning>`.

python planning.py BASE MODEL...
"""

import sys
import time

from freemerge.checkpoints import open_checkpoint
from freemerge.merging import make_plan

start = time.perf_counter()
base, *models = (open_checkpoint(path) for path in sys.argv[1:])
opened = time.perf_counter()
make_plan(base, models)
print(opened - start, time.perf_counter() - opened)
