"""Two networks on the same examples: flips, slices, likelihoods, each with its test."""
