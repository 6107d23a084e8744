"""Task sources: where a task's data come from, as a configuration can say it."""

from freemerge.data.sources.images import ImageSource
from freemerge.data.sources.npz import NpzSource
from freemerge.data.sources.source import TaskSource
from freemerge.data.sources.text_table import TextTableSource
from freemerge.data.sources.texts import TextSource

__all__ = ["ImageSource", "NpzSource", "TaskSource", "TextSource", "TextTableSource"]
