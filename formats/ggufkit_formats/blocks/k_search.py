"""The searches for scales of the K types, vectorised over groups of weights."""
