"""DTensors, FSDP, replicas and the collectives between them."""
