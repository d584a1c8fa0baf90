"""Closed-form edits of text-to-image models."""

from editing.edit import Edit, load
from editing.quickfix import quickfix
from editing.updates import LowRank

__all__ = ["Edit", "LowRank", "load", "quickfix"]
