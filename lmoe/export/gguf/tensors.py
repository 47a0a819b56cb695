"""The tensors of a model as llama.cpp wants them: renamed, experts stacked, heads in its order of rotation.

Shapes: E experts, H hidden size, I inner size of an expert, N heads, S size of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lmoe.errors import BackboneError
from lmoe.export.gguf.architectures import (
    HEAD,
    LAYERS,
    OUTER,
    Architecture,
    head_size,
    num_experts,
    weight_name,
)
from lmoe.export.gguf.file import GgufTensor
from lmoe.export.gguf.stored_weights import StoredWeights
from lmoe.files.wording import shown
from lmoe.vocabulary import GgufType

EXPERTS = "mlp.experts"
PARTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
EXACT = ("ffn_gate_inp", "ffn_gate_inp_shexp")
"""Matrices that stay in float32: a router that is rounded chooses other experts."""
IGNORED = "rotary_emb.inv_freq"
"""What old folders hold beside the weights, and everybody computes anew."""
Stack = tuple[tuple[int, ...], Callable[[], Tensor]]
"""Shape of a tensor, and what reads it."""


def rotated(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k as llama.cpp rotates them: it turns rows 2i and 2i + 1 of a head, where Transformers turns i and
    i + S/2.

    Args:
        tensor: (N*S, …) weight, bias, or lora_B.
        heads: N.
    """
    by_head = tensor.unflatten(0, (heads, 2, -1))  # (N, 2, S/2, …)
    return by_head.transpose(1, 2).flatten(0, 2)


def heads_of(architecture: Architecture, module: str, config: PreTrainedConfig) -> int | None:
    """Heads of a Linear whose rows `rotated` moves; None: they stay where they are.

    Args:
        module: its path, which may begin with that of its layer.
    """
    if not architecture.swaps_rope or not module.endswith(ROTATED):
        return None
    return config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads


def model_tensors(
    weights: StoredWeights, architecture: Architecture, config: PreTrainedConfig, kind: GgufType
) -> list[GgufTensor]:
    """Every tensor of the file, none of them read yet.

    Args:
        kind: of the matrices; vectors and routers are f32.

    Raises:
        BackboneError: a weight is missing, or one is there that would be left out.
    """
    return _Plan(weights, architecture, config, kind).tensors()


class _Plan:
    """What is made of which weights."""

    def __init__(
        self, weights: StoredWeights, architecture: Architecture, config: PreTrainedConfig, kind: GgufType
    ) -> None:
        self.weights, self.architecture, self.config, self.kind = weights, architecture, config, kind
        self.used: set[str] = set()

    def tensors(self) -> list[GgufTensor]:
        """Describe every tensor of the file, as `model_tensors`."""
        tied = self.config.tie_word_embeddings
        outer = [module for module in OUTER if not (tied and module == HEAD)]
        found = [self._plain(module, "weight") for module in outer]
        if (factors := _rope_factors(self.config)) is not None:
            name = "rope_freqs.weight"
            found.append(GgufTensor(name=name, shape=tuple(factors.shape), kind=GgufType.f32, read=lambda: factors))
        for layer in range(self.config.num_hidden_layers):
            found += self._of_layer(f"{LAYERS}.{layer}", layer)
        ignored = f"{HEAD}.weight" if tied else None
        left = [n for n in self.weights.shapes if n not in self.used and n != ignored and not n.endswith(IGNORED)]
        if left:
            raise BackboneError(
                f"{self.weights.folder}: {len(left)} weights are no part of this architecture in llama.cpp and would "
                f"be left out: {shown(sorted(left)[:5], longest=300)}"
            )
        return found

    def _of_layer(self, path: str, layer: int) -> list[GgufTensor]:
        found = []
        for inner in self.architecture.layer:
            found.append(self._plain(f"{path}.{inner}", "weight"))
            has_bias = f"{path}.{inner}.bias" in self.weights.shapes
            if inner in self.architecture.biases and (has_bias or self.architecture.needs_biases):
                found.append(self._plain(f"{path}.{inner}", "bias"))
        if self.architecture.is_mixture:
            found += self._experts(path, layer)
        return found

    def _plain(self, module: str, what: str) -> GgufTensor:
        """A weight or bias of one module."""
        stored = f"{module}.{what}"
        shape = self._shape(stored)
        name = weight_name(self.architecture, module)
        assert name is not None, module
        heads = heads_of(self.architecture, module, self.config)
        shape = tuple(size for size in shape if size != 1) if name.endswith("_inp_shexp") else shape

        def read() -> Tensor:
            (tensor,) = self.weights.read([stored])
            tensor = tensor.reshape(shape)
            return tensor if heads is None else rotated(tensor, heads)

        exact = len(shape) < 2 or name.rpartition(".")[2] in EXACT
        return GgufTensor(name=f"{name}.{what}", shape=shape, kind=GgufType.f32 if exact else self.kind, read=read)

    def _experts(self, path: str, layer: int) -> list[GgufTensor]:
        """The experts of a layer: one stack for gate, up and down each, from files that hold them fused or apart."""
        base = f"{path}.{EXPERTS}"
        fused = f"{base}.gate_up_proj" in self.weights.shapes
        found = []
        for part, name in PARTS.items():
            shape, read = self._fused(base, part) if fused else self._apart(base, part)
            found.append(GgufTensor(name=f"blk.{layer}.{name}.weight", shape=shape, kind=self.kind, read=read))
        return found

    def _apart(self, base: str, part: str) -> Stack:
        names = [f"{base}.{expert}.{part}.weight" for expert in range(num_experts(self.config))]
        shapes = {self._shape(name) for name in names}
        if len(shapes) > 1:
            raise BackboneError(f"{self.weights.folder}: the experts of {base}.*.{part} have shapes {shapes}")
        return (len(names), *shapes.pop()), lambda: torch.stack(self.weights.read(names))

    def _fused(self, base: str, part: str) -> Stack:
        """One part out of gate_up_proj (E, 2I, H), or down_proj (E, H, I)."""
        if part == "down_proj":
            return self._shape(f"{base}.down_proj"), lambda: self.weights.read([f"{base}.down_proj"])[0]
        experts, both, hidden = self._shape(f"{base}.gate_up_proj")
        half = 0 if part == "gate_proj" else 1

        def read() -> Tensor:
            (tensor,) = self.weights.read([f"{base}.gate_up_proj"])
            return tensor.unflatten(1, (2, -1))[:, half]

        return (experts, both // 2, hidden), read

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, which counts as used from now on.

        Raises:
            BackboneError: it is not there.
        """
        if name not in self.weights.shapes:
            raise BackboneError(f"{self.weights.folder}: {name} is missing")
        self.used.add(name)
        return self.weights.shapes[name]


def _rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """(S/2,) what llama.cpp divides the frequencies by, of a model that scales them as Llama 3 does; else None."""
    if (config.rope_parameters or {}).get("rope_type") != "llama3":
        return None
    size = head_size(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    return plain / scaled
