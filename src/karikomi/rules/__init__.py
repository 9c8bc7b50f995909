"""Stages, decisions, outcomes and checkpoints of clipping and bounding rules."""
