"""Removal of dead units from modules."""
