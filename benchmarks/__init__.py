"""EMAUnit compared with the blocks one would use instead; README.md says how each number is taken."""

import torch

TF32_OF_PYTORCH = torch.backends.cudnn.allow_tf32
"""Whether PyTorch by default lets a GPU's float32 convolutions use TF32."""

torch.backends.cudnn.allow_tf32 = False  # float32 convolutions as exact as float32 products, for every block
