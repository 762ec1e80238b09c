"""Which rows are computed, what that means for every tensor, and what it is expected to bring."""
