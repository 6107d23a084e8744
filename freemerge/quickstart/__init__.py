"""The demo suite and all that only it needs."""

from freemerge.quickstart.suite import QuickstartSuite

__all__ = ["QuickstartSuite"]
