"""Recompute activations in the backward pass, in each version of Transformers that lmoe allows."""

from transformers import PreTrainedModel

NOT_REENTRANT = {"use_reentrant": False}
"""NOTE the reentrant kind runs the forward without gradients: the auxiliary losses would train nothing."""


def recompute_activations(model: PreTrainedModel) -> None:
    """Let each decoder layer run again in the backward pass; gradients reach the adapters of a frozen base."""
    if hasattr(model, "activation_checkpointing_enable"):  # from Transformers 5.23 on, where the other is deprecated
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=NOT_REENTRANT)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=NOT_REENTRANT)
    model.enable_input_require_grads()
