"""Clip and bound named arrays as pure functions, for frameworks whose arrays are never written to."""
