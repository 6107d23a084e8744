"""Checks for classes of your own, each of which is one line in a test.

A failed check raises an `AssertionError` whose message states what is wrong and what is expected.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freemerge.testing.backbones import check_backbone as check_backbone
    from freemerge.testing.experts import check_expert as check_expert
    from freemerge.testing.methods import check_method as check_method
    from freemerge.testing.sources import check_source as check_source

_HOMES = {
    "check_backbone": "backbones",
    "check_expert": "experts",
    "check_method": "methods",
    "check_source": "sources",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
