"""How much is pruned from which tensor."""
