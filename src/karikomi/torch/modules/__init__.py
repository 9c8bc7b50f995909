"""Parameters, layer types and shapes of modules."""
