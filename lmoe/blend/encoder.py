"""Weights from the prompt: near which experts' texts it lies, decided once, so that a KV cache stays valid.

Shapes: B rows of T tokens, D hidden, E experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from lmoe.adapter.stored_base import KINDS
from lmoe.adapter.tensor_file import finite_tensors, stored_metadata, tensor_shapes
from lmoe.backbones.fingerprint import BaseFingerprint
from lmoe.backbones.mean_states import mean_states
from lmoe.blend.linear import Setting
from lmoe.blend.routers import Router, Weighed
from lmoe.errors import BlendError
from lmoe.files.write import write_whole
from lmoe.layers.per_call import PerCall
from lmoe.layers.prompt import ForwardInputs, PromptedGenerate, cache_of, decision_in, decision_of, keep_with
from lmoe.peft.reader import CENTROID_FILE
from lmoe.rules.blend import unknown_experts

TEXTS_AT_ONCE = 8
BASE = "base_fingerprint"
"""In the metadata of a centroid's file."""


class EncoderRouter(Router):
    """softmax over the top_k experts of cos(prompt - m, centroid_e - m) / temperature, m the mean of the centroids.

    A prompt is the mean of the base's last hidden states over its valid tokens, with all experts off: one more forward
    of the prompt, none for the tokens that follow. m is taken off because all hidden states of a language model share
    one large direction, next to which texts hardly differ; with a single expert m is 0.

    Args:
        blend: whose weights are decided.
        top_k: experts that take part; None: all.
        temperature: of the softmax.
    """

    TEMPERATURE = 0.1
    per_prompt = True

    def __init__(self, blend: Weighed, top_k: int | None, temperature: float) -> None:
        super().__init__(blend)
        self.top_k, self.temperature = top_k, temperature
        self.centroids: dict[str, Tensor] = {}
        self.prompt: PerCall[Tensor] = PerCall()
        self.experts_changed()

    def refuse_weights(self) -> None:
        raise BlendError("router=encoder sets the weights from each prompt; use router=weighted to set them")

    @property
    def unfitted(self) -> list[str]:
        """Experts without a centroid."""
        return [name for name in self.blend.names if name not in self.centroids]

    def check(self, folder: Path) -> None:
        if (folder / CENTROID_FILE).exists():
            self._read_centroid(folder)

    def experts_changed(self) -> None:
        """Read the centroids of experts that have one beside them."""
        folders = self.blend.folders
        self.centroids = {name: centroid for name, centroid in self.centroids.items() if name in folders}
        for name, folder in folders.items():
            if name not in self.centroids and (folder / CENTROID_FILE).exists():
                self.centroids[name] = self._read_centroid(folder)

    def forget(self, name: str) -> None:
        self.centroids.pop(name, None)

    def renamed(self, old: str, new: str) -> None:
        if old in self.centroids:
            self.centroids[new] = self.centroids.pop(old)

    def attach(self) -> None:
        PromptedGenerate(self.blend.model, self.prompt).attach()

    def detach(self) -> None:
        PromptedGenerate.detach(self.blend.model)

    def decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Setting | None:
        """Weights by row: those that the KV cache came with, or of a new prompt."""
        inputs = ForwardInputs.of(self.blend.model, args, kwargs)
        cached = inputs.cached_tokens
        if inputs.cache is not None and cached:
            return self._kept(decision_in(inputs.cache, cached))
        if inputs.tokens is None:
            return None
        if inputs.flattened:
            raise BlendError(
                "router=encoder does not know the prompts of rows that lie one behind the other (continuous batching): "
                "generate with one row a sequence, or set weights with router=weighted"
            )
        length = inputs.prompt_length(self.prompt.get())
        prompt, tokens = inputs.prompt(self.prompt.get())[:, :length], inputs.tokens[:, :length]
        with self.blend.silenced():
            states = mean_states(
                self.blend.model, prompt, **{"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
            )
        return Setting(self.weigh(states), by_row=True, experts=self.blend.numbers)

    def keep(self, setting: Setting, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Let the decision travel with the KV cache that its prompt has filled."""
        cache = cache_of(output)
        if cache is None or decision_of(cache) is setting:
            return
        inputs = ForwardInputs.of(self.blend.model, args, kwargs)
        if inputs.tokens is not None:
            keep_with(cache, setting, inputs.prompt_length(self.prompt.get()))

    def _kept(self, decision: object) -> Setting:
        if not isinstance(decision, Setting):
            raise BlendError(
                "router=encoder has no decision for this KV cache: it must have been filled by a forward of this model "
                "while it blends"
            )
        if (gone := decision.gone(self.blend.numbers)) is not None:
            raise BlendError(
                f"the experts of this KV cache were chosen when there was another {gone!r}; now there are "
                f"{', '.join(self.blend.names)}. Start with an empty cache"
            )
        return decision

    def of_prompt(self, ids: Tensor, names: Sequence[str] | None) -> dict[str, float]:
        """Weights for a prompt outside of a forward that goes on from it.

        Args:
            ids: (1, T).
            names: experts to choose from; None: all.

        Raises:
            BlendError: an expert has no centroid yet.
        """
        with self.blend.silenced():
            states = mean_states(self.blend.model, torch.ones_like(ids), input_ids=ids)
        return self.weigh(states, names)[0]

    def weigh(self, prompts_BD: Tensor, among: Sequence[str] | None = None) -> list[dict[str, float]]:
        """Weights of each row.

        Args:
            among: experts to choose from; None: all.

        Raises:
            BlendError: an expert has no centroid yet.
        """
        names = self.blend.names if among is None else list(among)
        if missing := [name for name in names if name not in self.centroids]:
            raise BlendError(
                f"router=encoder knows no centroid of {', '.join(missing)}: call "
                "blend.fit_centroids({name: [texts]}, tokenizer) first; blend.save_centroids() keeps them"
            )
        centroids = torch.stack([self.centroids[name] for name in names]).to(prompts_BD.device)
        middle = centroids.mean(0) if len(names) > 1 else torch.zeros_like(centroids[0])
        scores = normalize(prompts_BD - middle, dim=-1) @ normalize(centroids - middle, dim=-1).t() / self.temperature
        kept = scores.topk(min(self.top_k or len(names), len(names)), dim=-1)
        shares = torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1))
        return [dict(zip(names, row, strict=True)) for row in shares.tolist()]

    def _read_centroid(self, folder: Path) -> Tensor:
        return read_centroid(folder / CENTROID_FILE, width_of(self.blend.model), self.blend.base)


def fitted(blend: Weighed, texts: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """(D,) the mean of the encoded texts of each expert.

    Raises:
        BlendError: unknown names, or an expert without texts.
    """
    found = {}
    for name, own in texts.items():
        if unknown := unknown_experts([name], blend.names):
            raise BlendError(unknown[0])
        if isinstance(own, str) or not own or not all(isinstance(text, str) and text.strip() for text in own):
            raise BlendError(f"{name}: texts must be a list of non-empty texts")
        rows = []
        for first in range(0, len(own), TEXTS_AT_ONCE):
            batch = tokenizer(
                list(own[first : first + TEXTS_AT_ONCE]), return_tensors="pt", padding=True, truncation=True
            )
            ids, mask = (batch[key].to(blend.model.device) for key in ("input_ids", "attention_mask"))
            with blend.silenced():
                rows.append(mean_states(blend.model, mask, input_ids=ids))
        found[name] = torch.cat(rows).mean(0).cpu()
    return found


def save_centroids(centroids: Mapping[str, Tensor], folders: Mapping[str, Path], base: BaseFingerprint) -> list[Path]:
    """Each beside its expert, with the base whose hidden states it is a mean of.

    Raises:
        BlendError: two names for one folder.
        CheckpointError: a folder that cannot be written.
    """
    if len({folders[name] for name in centroids}) < len(centroids):
        raise BlendError("two experts come from one folder, which has room for one centroid; copy it")
    rounded = {f"base_{kind}": value for kind in KINDS if (value := getattr(base, kind)) is not None}
    about = {"format": "pt", BASE: base.digest, **rounded}
    for name, centroid in centroids.items():
        write_whole(folders[name], {CENTROID_FILE: save({"centroid": centroid.contiguous()}, metadata=about)})
    return [folders[name] / CENTROID_FILE for name in centroids]


def read_centroid(path: Path, width: int, base: BaseFingerprint) -> Tensor:
    """(D,) what `save_centroids` wrote.

    Raises:
        BlendError: it is of another base.
        CheckpointError: it cannot be read.
    """
    shapes = tensor_shapes(path)
    if shapes != {"centroid": (width,)}:
        raise BlendError(f"{path}: holds {shapes}, and this base needs a centroid of {width}; fit the centroids anew")
    about = stored_metadata(path)
    found = BaseFingerprint(digest=about.get(BASE, "none"), **{kind: about.get(f"base_{kind}") for kind in KINDS})
    if not found.same_base(base):
        raise BlendError(
            f"{path}: fitted on another base, fingerprint {found.digest}; this one has {base.digest}. Remove it, and "
            "fit anew"
        )
    return finite_tensors(path, ["centroid"])["centroid"].float()


def width_of(model: nn.Module) -> int:
    """D of a model's hidden states."""
    return model.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
