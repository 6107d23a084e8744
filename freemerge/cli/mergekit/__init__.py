"""mergekit's configurations in freemerge's own words: a table of theirs → a table of ours, without reading a model."""

from freemerge.cli.mergekit.translation import is_of_mergekit, translate

__all__ = ["is_of_mergekit", "translate"]
