"""Settings of the whole suite."""

import torch

# Small networks on few cores, often in several processes: more threads only get in each other's way.
torch.set_num_threads(1)
