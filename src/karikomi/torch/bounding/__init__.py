"""Weight bounds on the parameters of a module."""
