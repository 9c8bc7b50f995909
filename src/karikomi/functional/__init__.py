"""Clip and bound named arrays as pure functions, for frameworks whose arrays are never written to.

NumPy has its own, readable reference (`karikomi.numpy`) and torch writes in place (`karikomi.torch`); JAX,
TensorFlow and Keras share this: one `Library` each, and the same measure, decide, apply.
"""
