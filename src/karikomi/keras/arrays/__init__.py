"""Array operations and variables of the Keras backends."""
