"""Exact selection of what is pruned, in bounded memory, for every framework."""
