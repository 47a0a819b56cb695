"""Singular values of low-rank products, without forming the product.

Shapes: D in, O out, R rank of the factors, K = min(R, O, D).
"""

import torch
from torch import Tensor


def product_svd(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B A = U diag(S) V, from the QR of both factors: B = Q_b R_b, A^T = Q_a R_a, and the SVD of R_b R_a^T.

    Costs (O + D) R^2 where the SVD of the product costs O D min(O, D).

    Args:
        lora_A: (R, D).
        lora_B: (O, R).

    Returns:
        U (O, K), S (K,) descending, V (K, D), in float64.
    """
    Q_b, R_b = torch.linalg.qr(lora_B.double())
    Q_a, R_a = torch.linalg.qr(lora_A.double().t())
    left, values, right = torch.linalg.svd(R_b @ R_a.t(), full_matrices=False)
    return Q_b @ left, values, right @ Q_a.t()


def truncated(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest B A of a lower rank (Eckart-Young), its factors balanced: sqrt(S) on both sides.

    Args:
        lora_A: (R, D).
        lora_B: (O, R).
        rank: at least 1; more than there is gives all there is.

    Returns:
        lora_A (k, D), lora_B (O, k) in float32 with k = min(rank, K), and |B A - B_k A_k| / |B A| (Frobenius).
    """
    left, values, right = product_svd(lora_A, lora_B)
    kept, root = min(rank, len(values)), values[:rank].sqrt()
    whole = values.square().sum().item()
    error = (values[kept:].square().sum().item() / whole) ** 0.5 if whole else 0.0
    return (root[:, None] * right[:kept]).float(), (left[:, :kept] * root).float(), error


def top_direction(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The input that B A answers loudest: the right singular vector of its largest singular value, up to its sign.

    From A A^T = L L^T and the largest eigenvector y of L^T B^T B L: v = A^T z / |A^T z| with L^T z = y.

    Args:
        lora_A: (R, D).
        lora_B: (O, R).

    Returns:
        (D,) of length 1 in float32; 0 where B A is 0.
    """
    A, B = lora_A.double(), lora_B.double()
    values, vectors = torch.linalg.eigh(A @ A.t())
    kept = values > values[-1].clamp(min=0) * 1e-12
    if not kept.any():
        return torch.zeros(A.shape[1], device=A.device)
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    factor = vectors * roots
    strengths, inner = torch.linalg.eigh(factor.t() @ (B.t() @ B) @ factor)
    if strengths[-1] <= 0:
        return torch.zeros(A.shape[1], device=A.device)
    direction = A.t() @ (vectors @ (inner[:, -1] / roots))
    return (direction / direction.norm()).float()
