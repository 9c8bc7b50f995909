"""Training with masks that are made and held inside of compiled steps."""
