"""Weight bounds as constraints and after steps."""
