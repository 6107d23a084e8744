"""Tasks and task suites."""

from freemerge.data.mixture import TaskData, TaskMixture
from freemerge.data.quickstart import QuickstartSuite
from freemerge.data.suite import TaskSuite
from freemerge.data.tasks import ArrayDataset, Task, collate

__all__ = ["ArrayDataset", "QuickstartSuite", "Task", "TaskData", "TaskMixture", "TaskSuite", "collate"]
