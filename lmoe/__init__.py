"""Fine-tune a language model with a mixture of LoRA experts, and see what its routers do."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmoe.adapter.attach import attach as attach
    from lmoe.adapter.inject import inject as inject
    from lmoe.adapter.load import load as load
    from lmoe.adapter.save import save as save
    from lmoe.blend.blend import Blend as Blend
    from lmoe.explain.explain import explain_text as explain_text
    from lmoe.grow.import_experts import import_experts as import_experts
    from lmoe.injection.apply import plan as plan
    from lmoe.injection.balance import balance as balance
    from lmoe.injection.masked import masked_experts as masked_experts
    from lmoe.injection.reward_head import reward as reward
    from lmoe.injection.tracing import trace as trace

__version__ = "0.1.0"

# Imported when first used, so that `import lmoe` and the command line do not wait for torch.
_PUBLIC = {
    "Blend": "lmoe.blend.blend",
    "attach": "lmoe.adapter.attach",
    "explain_text": "lmoe.explain.explain",
    "inject": "lmoe.adapter.inject",
    "plan": "lmoe.injection.apply",
    "trace": "lmoe.injection.tracing",
    "balance": "lmoe.injection.balance",
    "load": "lmoe.adapter.load",
    "save": "lmoe.adapter.save",
    "import_experts": "lmoe.grow.import_experts",
    "masked_experts": "lmoe.injection.masked",
    "reward": "lmoe.injection.reward_head",
}
__all__ = [
    "Blend",
    "attach",
    "balance",
    "explain_text",
    "import_experts",
    "inject",
    "load",
    "masked_experts",
    "plan",
    "reward",
    "save",
    "trace",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lmoe' has no attribute {name!r}")
