"""The references are judged with few threads, so that the suite is quick beside others."""

import torch

torch.set_num_threads(2)
