"""Noise of a learnt size on the logits."""

from torch import Tensor
from torch.nn.functional import softplus


def noisy_logits(logits: Tensor, noise_logits: Tensor, noise: Tensor) -> Tensor:
    """z + noise * softplus(z_noise), to be followed by `top_k_gate` (Shazeer, 1701.06538, equation 4).

    softmax over the K kept logits, as in the paper's equation 3, is the same as softmax over all and renormalising
    the K largest.

    Args:
        logits: (..., E) clean logits x W_g.
        noise_logits: (..., E) x W_noise.
        noise: (..., E) standard normal.

    Returns:
        (..., E).
    """
    return logits + noise * softplus(noise_logits)
