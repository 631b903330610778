"""One thread: the tensors are small, and the suite stays quick on a busy machine."""

import torch

torch.set_num_threads(1)
