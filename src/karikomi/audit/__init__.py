"""Differences between a compressed network and the original, and its robustness."""

from __future__ import annotations

from karikomi.audit.compare import audit

__all__ = ["audit"]
