"""Facts measured on data for pruning scores."""
