"""The record of a run: one JSON row per event, appended, readable during the run."""

from karikomi.record.reading import SCHEMA, read, tally
from karikomi.record.recorder import Recorder
from karikomi.record.rows import check_facts
from karikomi.record.sinks import Sink

__all__ = ["SCHEMA", "Recorder", "Sink", "check_facts", "read", "tally"]
