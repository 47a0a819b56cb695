"""Files in a repository of the hub that an earlier push has left there, and that the next one takes away."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lmoe.files.adapter_files import CONFIG_FILE, TOKENIZER_FILES, WEIGHTS_FILE
from lmoe.files.export_record import EXPORT_FILE
from lmoe.files.hub import status_of
from lmoe.hub.card import HOME
from lmoe.hub.contents import GENERATION, MODEL_CONFIG, MODEL_INDEX, PICTURE_FOLDER, PICTURES
from lmoe.hub.licences import CARD, card_metadata
from lmoe.peft.files import CONFIG_FILE as PEFT_CONFIG
from lmoe.peft.files import WEIGHTS_FILE as PEFT_WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OF_A_PUSH = {
    *(CONFIG_FILE, WEIGHTS_FILE, PEFT_CONFIG, PEFT_WEIGHTS, MODEL_CONFIG, MODEL_INDEX, GENERATION, EXPORT_FILE),
    *TOKENIZER_FILES,
    *(f"{PICTURE_FOLDER}/{name}.png" for name in PICTURES),
}
"""Names under which a push sends files, but for the weights of a model and the card, which every push sends."""
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def left_over(api: "HfApi", name: str, revision: str | None, sent: Collection[str]) -> list[str]:
    """Paths of what an earlier push has left: files of the kinds that a push sends, and that this one does not.

    Nothing where the card there is not one of lmoe's, because then others have put there what lies there. Nothing where
    there is no such repository yet; a branch that is not there yet begins as main is.

    Args:
        api: of huggingface_hub, signed in.
        name: user/name.
        revision: branch; None: main.
        sent: paths that this push sends.

    Raises:
        Exception: of huggingface_hub, where the hub does not say it.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        there = api.list_repo_files(name, revision=revision)
    except RevisionNotFoundError:
        return left_over(api, name, None, sent) if revision is not None else []
    except RepositoryNotFoundError as error:
        if status_of(error) == 401:
            raise
        return []
    has_model = any(WEIGHTS.fullmatch(path) for path in there)
    left = [path for path in there if path in OF_A_PUSH or WEIGHTS.fullmatch(path)]
    # Without weights a push sends no config.json; people put one beside an adapter, by which the hub counts downloads.
    left = [path for path in left if path not in sent and (has_model or path != MODEL_CONFIG)]
    return sorted(left) if left and CARD in there and _is_own_card(api, name, revision) else []


def _is_own_card(api: "HfApi", name: str, revision: str | None) -> bool:
    """Whether the card in a repository is one that a push has written: it has lmoe's tag."""
    tags = card_metadata(Path(api.hf_hub_download(name, CARD, revision=revision))).get("tags")
    return isinstance(tags, list) and HOME in tags
