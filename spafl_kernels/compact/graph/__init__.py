"""Reading a model without touching it: its trace, what of it is watched, and how channels flow through it."""
