"""The one error that guidancekit raises on purpose."""

from __future__ import annotations


class GuidanceError(ValueError):
    """Something cannot work as asked: says what was found, what was expected and what to do."""
