"""What runs on a CPU: compiled operators beside their twins in plain PyTorch, and a layer that skips what is pruned."""
