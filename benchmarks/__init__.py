"""EMAUnit compared with the blocks one would use instead; README.md says how each number is taken."""

import torch

torch.backends.cudnn.allow_tf32 = False  # float32 convolutions as exact as float32 products, for every block
