"""Blend LoRA experts over one loaded base, with weights that may change at any time (docs/BLENDING.md)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.adapter.answer_end import write_answer_end
from lmoe.adapter.save_pretrained import RefuseToSave
from lmoe.backbones.fingerprint import base_fingerprint
from lmoe.backbones.placement import refuse_offloaded
from lmoe.blend.calls import GenerateBatchWithModelWeights, ModelGate
from lmoe.blend.encoder import EncoderRouter, fitted, save_centroids, width_of
from lmoe.blend.export import BlendExport, Method, export_peft
from lmoe.blend.fold import Folded, FoldReport, Keep
from lmoe.blend.forwards import BlendForwards
from lmoe.blend.head import BlendRoute, HeadRouter, place_of_head
from lmoe.blend.linear import Setting
from lmoe.blend.routers import ArrowRouter, Router, Static, checked_settings
from lmoe.blend.sites import Stacking, experts_dtype, refuse_unblendable
from lmoe.blend.stack import BlendStack, ReadExpert
from lmoe.blend.weights import Weights, checked_name, checked_weights
from lmoe.errors import BlendError
from lmoe.files.write import empty_folder
from lmoe.files.writing_folder import folder_when_whole
from lmoe.injection.record import BLEND
from lmoe.layers.context import RoutingContext
from lmoe.peft.expert_file import ExpertHeader
from lmoe.peft.reader import read_header
from lmoe.peft.router_head import read_head
from lmoe.vocabulary import BlendRouter, Decide, TrainOn

Place = str | Path


class Blend:
    """Experts beside the Linears of a model, in place: y = W x + sum_e w_e s_e B_e A_e x at every site.

    The base's tensors are never written, but by `fold`. Generation with a KV cache, batches, padding, static caches and
    torch.compile work as without a blend. Threads may share the model: each forward reads one setting of all weights
    when it begins, and experts come and go between forwards (compiled models serve one thread). A copy or a pickle of
    the model is a blend of its own. For inference: nothing of it trains.

    Args:
        model: a Hugging Face causal language model, plain or quantised, without other adapters.
        experts: by name: a PEFT adapter (directory or hub name), or an lmoe adapter or run of dense_lora.
        weights: by name; names left out are 0. None: 1 / E each. Negative ones and any sum work.
        router: weighted (weights may be set), static (they may not), arrow (each token at each site decides, without
            training), encoder (the prompt decides, see `fit_centroids`).
        top_k: arrow and encoder: experts that take part; None: 3 with arrow, all with encoder.
        temperature: arrow and encoder: of the softmax; None: 1 with arrow, 0.1 with encoder.
        head: encoder: the router of the run that the experts were exported from, in place of centroids; its file, or
            the folder around it and them.
        dtype: of the experts' tensors; None: that of the base, so that nothing is converted at each token.
        room: ranks that are kept free at each site, so that experts that come later need not wait until all are
            stacked anew. Experts that go leave their room to others.

    Raises:
        BlendError: weights, names or settings that cannot be, or a model that carries adapters already.
        CheckpointError: an expert that cannot be read or does not fit this model, which is left as it was.
        BackboneError: a model with weights that accelerate has offloaded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        experts: Mapping[str, Place],
        weights: Weights | None = None,
        router: BlendRouter | str = BlendRouter.weighted,
        *,
        top_k: int | None = None,
        temperature: float | None = None,
        head: Place | None = None,
        dtype: torch.dtype | None = None,
        room: int = 0,
    ) -> None:
        if isinstance(room, bool) or not isinstance(room, int) or room < 0:
            raise BlendError(f"`room={room!r}` must be a whole number of ranks, 0 or more")
        kind = checked_settings(router, top_k, temperature, head, weights=weights is not None)
        refuse_unblendable(model)
        refuse_offloaded(model, "blending")
        if not isinstance(experts, Mapping) or not experts:
            raise BlendError(f"experts must be a dict of names and places, with at least one, got {experts!r}")
        names = [checked_name(name, ()) for name in experts]
        given = dict.fromkeys(names, 1.0 / len(names)) if weights is None else weights
        setting = Setting(checked_weights(given, names), not isinstance(given, Mapping))
        self.model, self.base = model, base_fingerprint(model)
        self._closed = False
        self._folded: Folded | None = None
        self._gate = ModelGate()
        headers = {name: self._header(place) for name, place in experts.items()}
        known = None if head is None else read_head(head, self.base, width_of(model))
        reads = None if known is None else place_of_head(model, known)
        arrow = (top_k or ArrowRouter.TOP_K, temperature or 1.0) if kind is BlendRouter.arrow else None
        stacking = Stacking(dtype or experts_dtype(model), room)
        self._kind = kind
        self._stack = BlendStack(model, headers, stacking, setting, arrow)
        setattr(model, BLEND, self)
        self._forwards = BlendForwards(model, self._stack, self._gate)
        RefuseToSave(model).attach()
        try:
            if known is not None and reads is not None:
                self._router: Router = HeadRouter(self, known, reads)
            else:
                self._router = self._made_router(kind, top_k, temperature)
        except BaseException:
            self._release()
            raise
        self._forwards.router = self._router
        self._router.attach()
        GenerateBatchWithModelWeights(model, self._stack.settings).attach()

    @property
    def names(self) -> list[str]:
        """Names of the experts, in their order."""
        return list(self._stack.headers)

    @property
    def numbers(self) -> dict[str, int]:
        """A number for each expert by name, which no other expert has had."""
        return self._stack.numbers

    @property
    def sites(self) -> list[str]:
        """Module paths that carry at least one expert."""
        return list(self._stack.sites)

    @property
    def branches(self) -> dict[str, frozenset[str]]:
        """Module paths that each expert has a branch at, by its name."""
        return {name: frozenset(header.branches) for name, header in self._stack.headers.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """The largest rank of each expert at a site, by its name."""
        return {name: header.largest_rank for name, header in self._stack.headers.items()}

    @property
    def fingerprint(self) -> str:
        """Digest of the base."""
        return self.base.digest

    @property
    def folders(self) -> dict[str, Path]:
        """Where each expert was read from."""
        return {name: header.folder for name, header in self._stack.headers.items()}

    @property
    def weights(self) -> dict[str, float] | list[dict[str, float]]:
        """Weights of the experts by name, or one dict for each row of the batch. Setting replaces all: names left out
        are 0.

        Inside `using` those of the block; setting then is for all others, and for after it. With router=encoder what
        the last prompts got, by row.

        Raises:
            BlendError: unknown names, numbers that are not finite, a router that decides by itself, or a folded blend.
        """
        if self._router.per_token:
            raise BlendError("router=arrow weighs every token at every site by itself: there are no weights to read")
        setting = self._stack.settings.current
        if self._router.per_prompt and not setting.by_row:
            raise BlendError("router=encoder sets the weights from each prompt, and there was none yet")
        rows = [{name: row.get(name, 0.0) for name in self.names} for row in setting.rows]
        return rows if setting.by_row else rows[0]

    @weights.setter
    def weights(self, given: Weights) -> None:
        with self._gate.reading():
            self._stack.use(self._setting(given))

    @contextmanager
    def using(self, weights: Weights) -> Iterator[None]:
        """Use these weights for the forwards of this thread or asyncio task inside the block; others keep theirs.

        A thread that is started inside the block has the model's weights: open the block in the thread. A
        generator must not yield inside it.

        Args:
            weights: by name, or one dict for each row; names left out are 0.

        Raises:
            BlendError: as setting `weights`.
        """
        with self._gate.reading():
            setting = self._setting(weights)
            self._stack.warm(setting)
        with self._stack.settings.inside(setting):
            yield

    def add(self, name: str, place: Place) -> None:
        """One more expert, with weight 0; neither the base nor the other experts change.

        Raises:
            BlendError: the name is taken, or the blend is folded.
            CheckpointError: it cannot be read or does not fit; nothing has changed.
        """
        self._ready()
        self._router.refuse_change()
        checked_name(name, self.names)
        expert = self._read(place)
        with self._changing():
            self._stack.add(checked_name(name, self.names), expert)
            self._changed()

    def remove(self, name: str) -> None:
        """Take an expert off; the others keep their weights.

        Raises:
            BlendError: no such expert, or the blend is folded.
        """
        self._router.refuse_change()
        with self._changing(name):
            self._stack.remove(name)
            self._changed()

    def replace(self, name: str, place: Place) -> None:
        """Another expert under a name that is there, with its weight.

        Raises:
            BlendError: no such expert, or the blend is folded.
            CheckpointError: it cannot be read or does not fit; nothing has changed.
        """
        self._ready(name)
        self._router.refuse_change()
        expert = self._read(place)
        with self._changing(name):
            self._stack.replace(name, expert)
            self._router.forget(name)
            self._changed()

    def rename(self, old: str, new: str) -> None:
        """Another name for an expert.

        Raises:
            BlendError: no such expert, or a name that is taken.
        """
        self._router.refuse_change()
        with self._changing(old):
            self._stack.rename(old, checked_name(new, self.names))
            self._router.renamed(old, new)
            self._changed({old: new})

    def fit_centroids(self, texts: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> None:
        """Tell router=encoder what each expert is for, by some texts of its kind.

        Raises:
            BlendError: another router, unknown names, or no texts.
        """
        self._ready()
        self._encoder().centroids |= fitted(self, texts, tokenizer)

    def save_centroids(self) -> list[Path]:
        """Write what `fit_centroids` found beside each expert, from where the next blend reads it.

        Raises:
            BlendError: another router.
            CheckpointError: a folder that cannot be written.
        """
        return save_centroids(self._encoder().centroids, self.folders, self.base)

    @contextmanager
    def watched(self) -> Iterator[dict[str, float]]:
        """Each expert's part of all the weight that router=arrow has given inside the block in this thread, over tokens
        (those of the padding too) and sites; by name, filled when the block ends.

        Raises:
            BlendError: another router, whose weights can be read, or a folded blend.
        """
        shares: dict[str, float] = {}
        names = self.names
        with self._watching() as setting:
            yield shares
        if self._closed or self.names != names:
            raise BlendError("the experts have changed while they were watched")
        seen = self._stack.seen(setting)
        shares |= {name: seen.get(name, 0.0) for name in names}

    @contextmanager
    def watched_by_token(self, tokens: int) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
        """What router=arrow gives each expert at every token of one forward of this thread inside the block: a function
        that returns, behind the forward, (T,) means over the sites by the experts' names.

        Args:
            tokens: T of the forward, those of the padding too.

        Raises:
            BlendError: another router, a folded blend, or a thread that watches already.
        """
        with self._watching(tokens) as setting:
            yield lambda: self._stack.seen_by_token(setting)

    @contextmanager
    def _watching(self, tokens: int | None = None) -> Iterator[Setting]:
        """The setting of this thread inside the block, under which what Arrow gives is summed up."""
        self._ready()
        if not self._router.per_token:
            raise BlendError("only router=arrow weighs by token; read blend.weights")
        current = self._stack.settings.current
        if current.watched:
            raise BlendError("this thread watches already; one block at a time")
        setting = Setting(
            current.rows, silent=current.silent, watched=True, watched_tokens=tokens, experts=self._stack.numbers
        )
        with self._stack.settings.inside(setting):
            yield setting

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """The base alone, for the forwards of this thread inside the block.

        Raises:
            BlendError: the blend is folded.
        """
        self._ready()
        with self._stack.settings.inside(Setting((), silent=True)):
            yield

    @property
    def is_silent(self) -> bool:
        """Whether the base alone computes now, in this thread."""
        return self._stack.settings.current.silent

    @contextmanager
    def weights_by_token(self, weights: torch.Tensor, names: Sequence[str]) -> Iterator[None]:
        """Weigh each token of the forwards of this thread inside the block, in place of the weights or the router: for
        forwards that hold the tokens of many requests one behind the other, as in continuous batching.

        Args:
            weights: (B, T, E) for the tokens of each forward, or (B, 1, E) for its rows.
            names: of the E experts; all others are silent, and those that are not there any more too.

        Raises:
            BlendError: the blend is folded, or router=arrow weighs every token by itself.
        """
        with self.reading(self.token_setting(weights, names)):
            yield

    def token_setting(self, weights: torch.Tensor, names: Sequence[str]) -> Setting:
        """What `weights_by_token` lets the forwards read; made once where it serves many of them, through `reading`.

        Raises:
            BlendError: as `weights_by_token`.
        """
        self._ready()
        if self._router.per_token:
            raise BlendError("router=arrow weighs every token at every site by itself; use router=weighted")
        silent = not bool(weights.any())
        return Setting((), by_row=True, silent=silent, names=tuple(names), weights=weights, by_token=True)

    def weights_of_prompt(self, ids: torch.Tensor, names: Sequence[str] | None = None) -> dict[str, float]:
        """What router=encoder, without a head, decides for a prompt, by name.

        Args:
            ids: (1, T) tokens.
            names: experts to choose from; None: all.

        Raises:
            BlendError: another router, or an expert without a centroid.
        """
        self._ready()
        return self._encoder().of_prompt(ids, names)

    @property
    def route(self) -> BlendRoute | None:
        """What decides with a trained head, or None."""
        return self._router.route if isinstance(self._router, HeadRouter) else None

    @property
    def router(self) -> BlendRouter:
        """Who decides the weights."""
        return self._kind

    @property
    def unfitted(self) -> list[str]:
        """Experts that router=encoder cannot choose before `fit_centroids` tells it of them; none where another router
        or a head decides."""
        return self._router.unfitted if isinstance(self._router, EncoderRouter) else []

    @property
    def prompt_context(self) -> tuple[RoutingContext, Decide] | None:
        """Where a router's head looks for the prompts of conversations, and which of them it decides for; None: there
        is no head."""
        route = self._router.route if isinstance(self._router, HeadRouter) else None
        return None if route is None else (route.context, route.settings.decide)

    @property
    def train_on(self) -> TrainOn:
        """The turns of conversations that the run of the head has learnt; the others were a part of the prompt."""
        return self._router.train_on if isinstance(self._router, HeadRouter) else TrainOn.assistant

    def reading(self, setting: Setting) -> AbstractContextManager[None]:
        """A block in which this thread's forwards of the decoder compute with another setting."""
        return self._stack.settings.inside(setting)

    def decided(self, setting: Setting) -> None:
        """Show what a router has decided for the last prompts as the weights of the model."""
        self._stack.use(setting)

    @property
    def is_folded(self) -> bool:
        """Whether the blend is in the weights now."""
        return self._folded is not None

    def fold(self, keep: Keep = "copy") -> FoldReport:
        """Add the blend to the weights: from now on a token costs what it costs the base.

        Args:
            keep: copy: the originals stay in memory for `unfold`; reread: they are read again from the base's files.

        Raises:
            BlendError: weights by row or by token, a quantised or shared weight, files that differ, or folded already.
        """
        with self._gate.changing(self.model):
            self._ready()
            if self._stack.settings.own is not None:
                raise BlendError(
                    "cannot fold inside using(), silenced() or watched(): the weights of the model are folded"
                )
            blended = self._stack.blended(self._fixed("fold"))
            self._stack.detach()
            try:
                folded = Folded(self.model, blended, keep)
            except BaseException:
                self._stack.attach()
                raise
            self._folded, self._forwards.folded = folded, True
            return folded.report

    def unfold(self) -> None:
        """The base's weights as they were, bit by bit, and the experts beside them again.

        Raises:
            BlendError: not folded, or (keep=reread) the base's files are gone or have changed.
        """
        with self._gate.changing(self.model):
            if self._folded is None:
                raise BlendError("the blend is not folded")
            self._folded.unfold()
            self._folded, self._forwards.folded = None, False
            self._stack.attach()

    def export(self, folder: str | Path, method: Method = "cat", rank: int | None = None) -> BlendExport:
        """Write the blend as it is now as one PEFT adapter.

        Args:
            folder: made if missing; must be empty.
            method: cat: all ranks side by side, exact; svd: the nearest adapter of a rank, with its error by site.
            rank: of svd.

        Raises:
            BlendError: no fixed weights, all 0, a rank that cannot be, or something in the way.
            CheckpointError: the folder cannot be written.
        """
        self._ready()
        blended, name = self._stack.blended(self._fixed("export")), str(self.model.name_or_path)
        return export_peft(self.model, blended, folder, method=method, rank=rank, base_model=name)

    def save_merged(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write base and blend as one Hugging Face model; the blend stays as it is.

        Raises:
            BlendError: as `fold`, something in the way, or a folder that cannot be written, of which nothing is left.
        """
        target = empty_folder(folder, BlendError)
        with folder_when_whole(target, BlendError) as made:
            with self._gate.changing(self.model):
                folded_here = self._folded is None
                if folded_here:
                    self.fold()
                try:
                    self.model.save_pretrained(made)
                finally:
                    if folded_here:
                        self.unfold()
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
                write_answer_end(self.model, tokenizer, made)
        return target

    def close(self) -> None:
        """Take everything off: the model is the base again, bit by bit. A closed blend cannot be used again."""
        with self._gate.changing(self.model):
            if self._closed:
                return
            if self._folded is not None:
                self.unfold()
            self._router.detach()
            GenerateBatchWithModelWeights.detach(self.model)
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Blend({', '.join(self.names)}; {len(self.sites)} sites)"

    def _header(self, place: Place) -> ExpertHeader:
        return read_header(place, self.model, base=self.base)

    def _read(self, place: Place) -> ReadExpert:
        """An expert that is to come; forwards go on meanwhile."""
        header = self._header(place)
        self._router.check(header.folder)
        return ReadExpert.of(header)

    def _made_router(self, kind: BlendRouter, top_k: int | None, temperature: float | None) -> Router:
        if kind is BlendRouter.arrow:
            return ArrowRouter(self)
        if kind is BlendRouter.encoder:
            return EncoderRouter(self, top_k, temperature or EncoderRouter.TEMPERATURE)
        return Static(self) if kind is BlendRouter.static else Router(self)

    def _encoder(self) -> EncoderRouter:
        if isinstance(self._router, HeadRouter):
            raise BlendError("with a head router=encoder has no centroids: it decides as it was trained to")
        if not isinstance(self._router, EncoderRouter):
            raise BlendError("only router=encoder has centroids; make the blend with router='encoder'")
        return self._router

    def _fixed(self, what: str) -> dict[str, float]:
        """The weights of the model, where there are any."""
        setting = self._stack.settings.of_model
        if self._router.per_token or self._router.per_prompt or setting.by_row:
            by = "token" if self._router.per_token else "prompt" if self._router.per_prompt else "row"
            raise BlendError(
                f"cannot {what} a blend whose weights differ by {by}; set one dict of weights for the model, with "
                "router=weighted"
            )
        return {name: setting.rows[0].get(name, 0.0) for name in self.names}

    def _setting(self, given: Weights) -> Setting:
        """Weights that the user gives, checked."""
        self._ready()
        rows = checked_weights(given, self.names)
        self._router.refuse_weights()
        return Setting(rows, not isinstance(given, Mapping), experts=self._stack.numbers)

    @contextmanager
    def _changing(self, *names: str) -> Iterator[None]:
        """Alone with the model, for a change of these experts."""
        with self._gate.changing(self.model):
            self._ready(*names)
            yield

    def _ready(self, *names: str) -> None:
        if self._closed:
            raise BlendError("this blend is closed; make a new one")
        if self._folded is not None:
            raise BlendError("the blend is folded into the weights; call unfold() first")
        for name in names:
            if name not in self._stack.headers:
                raise BlendError(f"no expert {name!r}; there are {', '.join(self.names)}")

    def _changed(self, renamed: Mapping[str, str] | None = None) -> None:
        """Other experts: the model's weights of those that are still there."""
        before, names = self._stack.settings.of_model, self.names
        old = {new: name for name, new in (renamed or {}).items()}
        rows = [{name: row.get(old.get(name, name), 0.0) for name in names} for row in before.rows]
        self._router.experts_changed()
        self._stack.use(Setting(rows, before.by_row, experts=self._stack.numbers))

    def _release(self) -> None:
        self._forwards.detach()
        self._stack.close()
        delattr(self.model, BLEND)
        RefuseToSave.detach(self.model)
        self._closed = True
