"""The quickstart suite: six small tasks made from files in installed packages, and the code that only it needs."""

from freemerge.quickstart.suite import QuickstartSuite

__all__ = ["QuickstartSuite"]
