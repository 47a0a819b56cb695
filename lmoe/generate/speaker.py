"""What speaks: a trained run, or a base with experts blended over it; the same for a prompt and for a chat."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.adapter.answer_end import answers_end
from lmoe.adapter.folder import CONFIG_FILE as LMOE_CONFIG
from lmoe.adapter.load import load
from lmoe.adapter.place import adapter_folder, local_checkpoint, lost_config
from lmoe.adapter.run_data import learnt_turns
from lmoe.backbones.fingerprint import base_fingerprint
from lmoe.backbones.load import load_model, load_tokenizer
from lmoe.backbones.placement import placed
from lmoe.blend.blend import Blend
from lmoe.config.backbone import BackboneConfig
from lmoe.data.chats.template_input import content_of
from lmoe.data.chats.template_source import TEMPLATE_FILE, read_template
from lmoe.data.rows.sources import read_rows
from lmoe.errors import CheckpointError, ConfigError, DataError
from lmoe.files.small_file import link_outside, unreadable
from lmoe.generate.generate import Sampling, Turn, stream_answer
from lmoe.injection.record import injected
from lmoe.injection.tracing import domain as of_domain
from lmoe.peft.files import CONFIG_FILE as PEFT_CONFIG
from lmoe.peft.router_head import HEAD_FILE, head_file
from lmoe.vocabulary import BackbonePrecision, TrainOn

FITTED_PROMPTS = 64
"""Enough for a mean."""
ADAPTER_CONFIGS = (LMOE_CONFIG, PEFT_CONFIG)


@dataclass(slots=True, kw_only=True)
class Speaker:
    """A model with its tokenizer.

    Args:
        template_place: folder or hub name that the tokenizer's chat template is from, for messages.
        blend: its experts, where it is a base with some.
        domain: of every prompt, for moe.router=oracle.
        folders: of the adapter, or of each expert, by name.
        settings: of the blend, for people.
        train_on: the turns of conversations that it has learnt.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template_place: str
    blend: Blend | None = None
    domain: str | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    train_on: TrainOn = TrainOn.assistant

    def answer(self, prompt: str | list[Turn], sampling: Sampling, write: Callable[[str], object]) -> str:
        """The answer to a prompt or a conversation, piece by piece.

        Raises:
            DataError: the chat template, which is named, refuses it; or it is empty, or leaves no room in the context.
        """
        try:
            with self.about():
                return stream_answer(self.model, self.tokenizer, prompt, sampling, write, train_on=self.train_on)
        except DataError as error:
            if self.tokenizer.chat_template is None:
                raise
            raise DataError(f"{error} (chat template of {self.template_place})") from None

    def made_of(self) -> dict[str, Any]:
        """What decides its answers to given tokens, as short texts and numbers by name, to tell two speakers apart.

        Raises:
            CheckpointError: a file of an adapter cannot be read any more.
            BackboneError: weights that accelerate has offloaded.
        """
        digests = {name: digest_of_adapter(folder) for name, folder in self.folders.items()}
        about = {"base": base_fingerprint(self.model).digest, "dtype": str(self.model.dtype).removeprefix("torch.")}
        return {**digests, **about, **self.settings, "domain": self.domain}

    @contextmanager
    def about(self) -> Iterator[None]:
        """A block whose forwards know the domain of the prompts."""
        with nullcontext() if self.domain is None else of_domain(self.model, self.domain):
            yield


def trained(
    checkpoint: str,
    *,
    base_model: str | None,
    domain: str | None,
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Speaker:
    """A run or an adapter, routers and all.

    Args:
        checkpoint: its directory, or the name of an adapter on the hub.
        device: where it computes; None: a GPU where there is one.
        trust_remote_code: run Python that comes with the base.
        revision: of an adapter on the hub.

    Raises:
        LmoeError: as lmoe.load, or no such device.
    """
    place = local_checkpoint(checkpoint, revision, trust_remote_code=trust_remote_code)
    model, tokenizer = load(place, base_model=base_model, trust_remote_code=trust_remote_code)
    if injected(model).reward_head:
        warnings.warn(
            f"{checkpoint} is a reward model, which has learnt to score answers and not to give them; `lmoe.reward` "
            "scores texts with it",
            stacklevel=2,
        )
    folder = lost_config(place) or adapter_folder(place)
    return Speaker(
        model=placed(model, device),
        tokenizer=tokenizer,
        template_place=str(tokenizer.name_or_path),
        domain=domain,
        folders={"checkpoint": folder},
        train_on=learnt_turns(model, folder),
    )


def blended(
    model_name: str,
    experts: dict[str, str],
    weights: dict[str, float] | None,
    *,
    router: str,
    precision: BackbonePrecision,
    top_k: int | None = None,
    router_temperature: float | None = None,
    fit: Mapping[str, str] | None = None,
    head: str | None = None,
    room: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Speaker:
    """A base with experts over it; without any, the base.

    Args:
        room: ranks that the blend keeps free for experts that come later.
        fit: rows by the name of an expert, whose prompts tell router=encoder what it is for; that is kept beside it.
        head: for router=encoder the trained router beside exported experts: its folder or file.
        device: where it computes; None: a GPU where there is one.
        trust_remote_code: run Python that comes with the base.

    Raises:
        LmoeError: a base that cannot be loaded, experts that do not fit, weights that cannot be, no such device.
    """
    texts = {name: prompts(place) for name, place in (fit or {}).items()}
    backbone = BackboneConfig(model_name=model_name, precision=precision, trust_remote_code=trust_remote_code)
    model, tokenizer = placed(load_model(backbone), device), load_tokenizer(backbone)
    blend, place = None, str(tokenizer.name_or_path)
    if experts:
        blend = Blend(
            model, experts, weights, router, top_k=top_k, temperature=router_temperature, head=head, room=room
        )
        if texts:
            blend.fit_centroids(texts, tokenizer)
            blend.save_centroids()
        if blend.unfitted:
            raise ConfigError(_unfitted(blend))
        place = _take_template(tokenizer, blend) or place
    answers_end(model, tokenizer)
    return Speaker(
        model=model,
        tokenizer=tokenizer,
        template_place=place,
        blend=blend,
        folders={} if blend is None else {f"expert {name}": folder for name, folder in blend.folders.items()},
        settings={
            "precision": str(precision),
            "router": str(router),
            "weights": None if weights is None else " ".join(f"{name}={weights[name]:g}" for name in sorted(weights)),
            "experts_top_k": top_k,
            "router_temperature": router_temperature,
            "head": None if head is None else digest_of_file(head_file(head)),
        },
        train_on=TrainOn.assistant if blend is None else blend.train_on,
    )


def _unfitted(blend: Blend) -> str:
    """What to say where router=encoder cannot choose yet."""
    said = (
        f"`router=encoder` does not know yet what {', '.join(blend.unfitted)} is for: give `fit` "
        f"{blend.unfitted[0]}=ROWS,… once, rows with prompts of its kind"
    )
    parents = {folder.parent for folder in blend.folders.values()}
    beside = next((folder for folder in parents if (folder / HEAD_FILE).exists()), None)
    return said if beside is None else f"{said}; or `head={beside}`, the router that they were trained with"


def digest_of_file(path: Path) -> str:
    """Digest of what a file holds.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with open(path, "rb") as content:
            return f"sha256 {hashlib.file_digest(content, 'sha256').hexdigest()[:32]}"
    except OSError as error:
        raise CheckpointError(f"{path}: {unreadable(error)}") from None


def digest_of_adapter(folder: Path) -> str:
    """Digest of the tensors and the config of an adapter.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    configs = [file for name in ADAPTER_CONFIGS if (file := folder / name).is_file()]
    for file in [*configs, *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.name.encode() + b"\0")
        try:
            with open(file, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        except OSError as error:
            raise CheckpointError(f"{file}: {unreadable(error)}") from None
    return f"sha256 {digest.hexdigest()[:32]}"


def _take_template(tokenizer: PreTrainedTokenizerBase, blend: Blend) -> str | None:
    """Speak to the experts as they were spoken to in training: by the chat template beside them, where they agree.

    Returns:
        The folder of the template; None: the tokenizer keeps its own.
    """
    found: dict[str, list[str]] = {}
    for name, folder in blend.folders.items():
        if (template := stored_template(folder)) is not None:
            found.setdefault(template, []).append(name)
    if len(found) > 1:
        named = "; ".join(", ".join(names) for names in found.values())
        warnings.warn(
            f"these experts were trained with different chat templates: {named}; all are asked with the base's own",
            stacklevel=3,
        )
    elif found:
        tokenizer.chat_template, names = next(iter(found.items()))
        return str(blend.folders[names[0]])
    return None


def stored_template(folder: Path) -> str | None:
    """The chat template that was saved with an expert, or None.

    Raises:
        DataError: it cannot be read.
    """
    file = folder / TEMPLATE_FILE
    if (problem := link_outside(file)) is not None:
        raise DataError(problem)
    return read_template(str(file)) if file.is_file() else None


def prompts(place: str, count: int = FITTED_PROMPTS) -> list[str]:
    """The first user turns of the first rows of a JSONL file or a folder of them.

    Args:
        count: at most.

    Raises:
        DataError: rows that cannot be read, or none with a prompt.
    """
    conversations = [row.messages for row in read_rows(place) if row.messages]
    asked = [[content_of(turn) for turn in turns if turn["role"] == "user"] for turns in conversations]
    if not (first := [turns[0] for turns in asked if turns]):
        raise DataError(f"{place}: no row has a turn of the user")
    return first[:count]
