"""A merge by freemerge from Python.

python merge_models.py '{"base": …, "models": […], "method": "Ties(0.2)", "output": …, "options": {…}}'
"""

import json
import sys

from freemerge import merging
from freemerge.runtime import own_process

own_process()
job = json.loads(sys.argv[1])
method = eval(job["method"], vars(merging))
merging.merge(job["base"], job["models"], method, output=job["output"], **job["options"])
