"""What a compressed network does differently from the one it came from, and how robust it is."""

from __future__ import annotations

from karikomi.audit.compare import audit

__all__ = ["audit"]
