"""For all tests: one thread, as in the simulator's workers; threads of two test processes disturb each other."""

import torch

torch.set_num_threads(1)
