"""HTML pages and terminal tables of results, audits, sweeps and records."""

from __future__ import annotations

from karikomi.report.advice_view import advice_page
from karikomi.report.audit_view import audit_markdown, audit_page, audit_table
from karikomi.report.compress_text import compress_table
from karikomi.report.compress_view import compress_page
from karikomi.report.importance_view import importance_page
from karikomi.report.page import write_page
from karikomi.report.sweep_view import sweep_page, sweep_table
from karikomi.report.training_view import TrainingPage, training_page, training_table

__all__ = [
    "TrainingPage",
    "advice_page",
    "audit_markdown",
    "audit_page",
    "audit_table",
    "compress_page",
    "compress_table",
    "importance_page",
    "sweep_page",
    "sweep_table",
    "training_page",
    "training_table",
    "write_page",
]
