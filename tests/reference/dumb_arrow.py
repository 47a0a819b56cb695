"""Arrow routing, expert by expert and token by token."""

import torch
from torch import Tensor


def dumb_arrow(x_TD: Tensor, branches: list[tuple[Tensor, Tensor, float] | None], top_k: int, temperature: float):
    """(T, O) sum_e w_te s_e B_e A_e x_t and (T, E) weights, with the singular vectors of the whole products."""
    outputs, weights = [], []
    for x in x_TD:
        scores = {}
        for expert, branch in enumerate(branches):
            if branch is not None:
                lora_A, lora_B, _ = branch
                direction = torch.linalg.svd((lora_B @ lora_A).double()).Vh[0]
                scores[expert] = (direction @ x.double()).abs() / temperature
        chosen = sorted(scores, key=lambda expert: -scores[expert])[:top_k]
        total = sum(scores[expert].exp() for expert in chosen)
        row, output = torch.zeros(len(branches)), 0
        for expert in chosen:
            lora_A, lora_B, scaling = branches[expert]
            row[expert] = scores[expert].exp() / total
            output = output + row[expert] * scaling * (lora_B @ (lora_A @ x))
        outputs.append(output)
        weights.append(row)
    return torch.stack(outputs), torch.stack(weights)
