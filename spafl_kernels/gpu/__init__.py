"""What runs on a GPU: the choice of an implementation, operators, launchers, Triton kernels and tables of times."""
