import torch
from hypothesis import settings

# One thread: fair to others on shared cores, and the same order of additions everywhere.
torch.set_num_threads(1)
# No deadline per example: a shared core may pause at any moment.
settings.register_profile("shared_cores", deadline=None)
settings.load_profile("shared_cores")
