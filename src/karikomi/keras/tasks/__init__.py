"""A Keras model as a task of the search: examples, training, evaluation, and the forms it is written in."""
