"""The record of what happened: one JSON row per event, appended, readable while the run goes on."""

from niwaki.record.reading import SCHEMA, read, tally
from niwaki.record.recorder import Recorder
from niwaki.record.rows import check_facts
from niwaki.record.sinks import Sink

__all__ = ["SCHEMA", "Recorder", "Sink", "check_facts", "read", "tally"]
