"""The decoder layers of an injected model, compiled for training."""

from transformers import PreTrainedModel

from lmoe.injection.record import injected
from lmoe.layers.compiled_forward import CompiledForward, LayerCompiler


def compile_layers(model: PreTrainedModel, *, recompute: bool) -> LayerCompiler:
    """Let each decoder layer of a model train as compiled code, in place.

    Embeddings, the output layer and the losses are not compiled: they are one call each.

    Args:
        model: injected.
        recompute: run each layer again in the backward pass, in place of `recompute_activations`.

    Returns:
        What compiles them; it is to be told of each phase.
    """
    record = injected(model)
    compiler = LayerCompiler(record.trace, record.context, recompute=recompute)
    for path in record.plan.layers:
        CompiledForward(model.get_submodule(path), compiler).attach()
    if recompute:
        model.enable_input_require_grads()
    return compiler
