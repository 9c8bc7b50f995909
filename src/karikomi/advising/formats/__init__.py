"""Readers of what other tools log, and of karikomi's own records: one file a format, found by content."""

from karikomi.advising.formats.opening import open_run

__all__ = ["open_run"]
