"""Forward passes observed: batches, hooks, weight reads and outputs."""
