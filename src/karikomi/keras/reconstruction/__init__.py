"""What layers of Keras multiply, as regressions of dense outputs on present inputs."""
