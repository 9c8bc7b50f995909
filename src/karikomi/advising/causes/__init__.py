"""Suspected causes of what went wrong in a run: one family of rules a file, asked in order by `asking`."""
