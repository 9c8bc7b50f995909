"""What two networks look at."""
