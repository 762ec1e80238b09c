"""A plan as a list of calls: what they read and write, in which memory, and what is one call."""
