"""The exported graph of a module: how it is made, rewritten for the units that stay, and compared."""
