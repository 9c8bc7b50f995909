"""How important a weight or a unit is."""
