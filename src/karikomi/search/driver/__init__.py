"""The driver of a search: proposals, a journal of finished candidates, executors, budgets and the Pareto front.

A candidate is a pure function of proposal, seed and data reference. One driver proposes, journals and decides;
executors only evaluate. So neither the number of workers nor the order in which they finish changes a result.
"""

from __future__ import annotations

from karikomi.search.driver.budgets import Budgets, Judgement
from karikomi.search.driver.executors import InlineExecutor, Workers, opened
from karikomi.search.driver.joint_rounds import Asking, missing_of, together
from karikomi.search.driver.latency_table import LatencyTable
from karikomi.search.driver.own_source import source_digest
from karikomi.search.driver.pareto import front
from karikomi.search.driver.proposal import Proposal
from karikomi.search.driver.rounds import Evaluate, Measured, Strategy, drive
from karikomi.search.driver.run_journal import Finished, RunJournal

__all__ = [
    "Asking",
    "Budgets",
    "Evaluate",
    "Finished",
    "InlineExecutor",
    "Judgement",
    "LatencyTable",
    "Measured",
    "Proposal",
    "RunJournal",
    "Strategy",
    "Workers",
    "drive",
    "front",
    "missing_of",
    "opened",
    "source_digest",
    "together",
]
