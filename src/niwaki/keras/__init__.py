"""niwaki for Keras 3 on every backend, and for TensorFlow's own loops."""
