"""The record of what happened: one JSON row per event, appended, readable while the run goes on."""

from niwaki.record.journal import SCHEMA, Recorder, read

__all__ = ["SCHEMA", "Recorder", "read"]
