"""How alike the experts of a site are as matrices, without forming one.

Shapes: E experts, D in, O out, R rank. The delta of expert e is B_e A_e, (O, D).
"""

import torch
from torch import Tensor


def expert_inner_products(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """G_ij = <B_i A_i, B_j A_j>_F = sum((B_i^T B_j) * (A_i A_j^T)).

    tr(A_i^T B_i^T B_j A_j) turned round, so that two (E R, E R) Gram matrices do; cost E^2 R^2 (D + O) rather than the
    E R D O + E^2 D O of dense deltas. In float32 at least, whatever autocast says: small angles are differences of
    large sums.

    Args:
        lora_A: (E, R, D), or (1, R, D) where all experts share it.
        lora_B: (E, O, R).

    Returns:
        (E, E) in float32, or float64 for float64 factors.

    Raises:
        ValueError: the shapes do not belong together.
    """
    experts, _, rank = lora_B.shape
    if lora_A.shape[0] not in (1, experts) or lora_A.shape[1] != rank:
        raise ValueError(
            f"lora_A is {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}; they must be (E, R, D) or (1, R, D), "
            "and (E, O, R), with the same E and R"
        )
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    with torch.autocast(lora_A.device.type, enabled=False):
        a_ERxD = lora_A.to(dtype).flatten(0, 1)
        b_ERxO = lora_B.to(dtype).mT.flatten(0, 1)
        gram_A = (a_ERxD @ a_ERxD.T).view(lora_A.shape[0], rank, lora_A.shape[0], rank)
        gram_B = (b_ERxO @ b_ERxO.T).view(experts, rank, experts, rank)
        return (gram_A * gram_B).sum((1, 3))


def expert_cosine(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """cos_ij = G_ij / sqrt(G_ii G_jj), the angle between two experts' deltas; scaling cancels.

    1 for copies, 0 for deltas with nothing in common, -1 for opposites. An expert whose delta is 0 has 0 with all,
    itself included, and no gradient: NOTE lora_B = 0, as at the start of LoRA, is such a point.

    Args:
        lora_A: (E, R, D), or (1, R, D) where all experts share it.
        lora_B: (E, O, R).

    Returns:
        (E, E) in float32, or float64 for float64 factors.
    """
    products_EE = expert_inner_products(lora_A, lora_B)
    square_E = products_EE.diagonal()
    is_zero = square_E < torch.finfo(square_E.dtype).tiny
    inverse_E = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square_E).rsqrt())
    return products_EE * inverse_E[:, None] * inverse_E


def mean_expert_cosine(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Mean over i != j of cos_ij: 1 where all experts are copies, from -1 / (E - 1); 0 for E = 1.

    Args:
        lora_A: (E, R, D), or (1, R, D) where all experts share it.
        lora_B: (E, O, R).

    Returns:
        () in float32, or float64 for float64 factors.
    """
    return _mean_of_pairs(expert_cosine(lora_A, lora_B))


def diversity_penalty(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Mean over i != j of cos_ij^2: 0 where the deltas are orthogonal, 1 where they are parallel; 0 for E = 1.

    Experts of a mixture of LoRA tend to the same representation (OMoE, 2501.10062). OMoE makes their outputs orthogonal
    for each token by Gram-Schmidt; this asks the deltas themselves to be, softly, and adds no work to the forward.

    Args:
        lora_A: (E, R, D), or (1, R, D) where all experts share it.
        lora_B: (E, O, R).

    Returns:
        () in float32, or float64 for float64 factors; differentiable.
    """
    return _mean_of_pairs(expert_cosine(lora_A, lora_B).square())


def _mean_of_pairs(matrix_EE: Tensor) -> Tensor:
    experts = matrix_EE.shape[0]
    pairs = 1 - torch.eye(experts, dtype=matrix_EE.dtype, device=matrix_EE.device)
    return (matrix_EE * pairs).sum() / max(1, experts * (experts - 1))
