"""One training: the arena that weights and momentum lie in, the rows that are dropped, and the step."""
