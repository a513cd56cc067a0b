import torch

# One thread: fair to others on shared cores, and the same order of additions everywhere.
torch.set_num_threads(1)
