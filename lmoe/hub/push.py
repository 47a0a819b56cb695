"""Bring an adapter or an exported model to the hub, with its card."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lmoe import __version__
from lmoe.config.problems import without_effect
from lmoe.errors import ConfigError, HubError
from lmoe.files.hub import SIGN_IN, name_problem, status_of, why_not_written
from lmoe.hub.card import card_text
from lmoe.hub.contents import Contents, Kind, contents_of
from lmoe.hub.description import describe
from lmoe.hub.left_over import left_over
from lmoe.hub.licences import CARD
from lmoe.run.verb_call import Wording

MAIN = "main"
MESSAGE = f"Upload with version {__version__} of lmoe"


@dataclass(slots=True, frozen=True, kw_only=True)
class PushSettings:
    """What goes where.

    Args:
        checkpoint: a run directory, an adapter directory, or a folder that was exported.
        name: user/name on the hub.
        public: everybody may read a repository that is made; else nobody but its owner.
        revision: branch, made where it is missing; None: main.
        message: of the commit; None: one that names lmoe.
        base_model: name on the hub of the base, where the checkpoint names it by a local path.
    """

    checkpoint: str
    name: str
    public: bool = False
    revision: str | None = None
    message: str | None = None
    base_model: str | None = None

    def problems(self) -> list[str]:
        """What the hub would refuse, without asking it, and before anything is read."""
        problems = []
        if (why := name_problem(self.name)) is not None:
            problems.append(f"`name={self.name}`: {why}")
        if self.base_model is not None and (why := name_problem(self.base_model)) is not None:
            problems.append(f"`base_model={self.base_model}`: {why}")
        if self.message is not None and not self.message.strip():
            problems.append("`message` is empty; say what is pushed, or leave it out")
        if self.revision is not None and not self.revision.strip():
            problems.append("`revision` is empty; name a branch, or leave it out")
        return problems


@dataclass(slots=True, frozen=True, kw_only=True)
class Push:
    """All that goes to the hub.

    Args:
        settings: where it goes.
        contents: the files but for the card.
        card: README.md.
    """

    settings: PushSettings
    contents: Contents
    card: str

    @property
    def files(self) -> dict[str, Path | bytes]:
        """Path in the repository -> a file, or the bytes to write there."""
        return {CARD: self.card.encode("utf-8"), **self.contents.files}

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path in the repository."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }

    def warnings(self) -> list[str]:
        """What others will lack, and what the card cannot vouch for."""
        contents, changed = self.contents, []
        if contents.changed:
            changed = [
                f"{contents.folder} is not as it was exported: {'; '.join(contents.changed)}. The card says nothing of "
                "its run; export it again to push what was trained"
            ]
        if contents.kind is Kind.model or contents.base or not contents.base_place:
            return changed
        return [
            f"the base is a folder of this machine ({contents.base_place}), whose path is not pushed: others name "
            "the base when they load it. Where it is on the hub, name it: `base_model`"
        ]


def prepared(settings: PushSettings, *, wording: Wording = str) -> Push:
    """What would go to the hub; needs neither network nor token.

    Args:
        wording: how the card says the command that uses it.

    Raises:
        ConfigError: names that the hub refuses; nothing was read.
        CheckpointError: nothing there that can be pushed.
    """
    if problems := settings.problems():
        raise ConfigError(problems)
    contents = contents_of(settings.checkpoint, settings.base_model)
    card = card_text(settings.name, describe(contents), settings.revision, wording=wording)
    return Push(settings=settings, contents=contents, card=card)


def planned_removals(planned: Push) -> list[str] | None:
    """Paths of files that an earlier push has left there, and that this one takes away; None: the hub was not asked,
    because nobody is signed in, or does not say it."""
    try:
        secret = token()
        from huggingface_hub import HfApi

        with _refusals(planned.settings.name, secret):
            return left_over(HfApi(token=secret), planned.settings.name, planned.settings.revision, planned.files)
    except HubError:
        return None


def token() -> str:
    """The token of whoever is signed in: that of the environment, or the one that huggingface_hub has stored.

    Raises:
        HubError: there is none, or the network is forbidden.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE forbids the network: unset it to push, or see what would go with `dry_run`")
    if (found := get_token()) is None:
        raise HubError(f"nobody is signed in to the hub: {SIGN_IN}; or see what would go with `dry_run`")
    return found


def push(settings: PushSettings, say: Callable[[str], object] = lambda line: None, *, wording: Wording = str) -> str:
    """Make the repository where it is missing, and commit all files at once; files of an earlier push go with that.

    What has arrived when a push breaks is not sent again: large files are known by their SHA-256, and the commit comes
    last, so that nobody ever sees half of one.

    Args:
        say: told what others will lack, and what is taken away.
        wording: how the card says the command that uses it.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: names that the hub refuses.
        HubError: no token, or a refusal of the hub; never tells the token.
        CheckpointError: nothing there that can be pushed.
    """
    if problems := settings.problems():
        raise ConfigError(problems)
    secret = token()
    planned = prepared(settings, wording=wording)
    for warning in planned.warnings():
        say(warning)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=secret)
    with _refusals(settings.name, secret):
        _make_repository(api, settings)
        if settings.revision not in (None, MAIN):
            api.create_branch(settings.name, branch=str(settings.revision), exist_ok=True)
        if left := left_over(api, settings.name, settings.revision, planned.files):
            say(f"of what an earlier push has left there, this one takes away {', '.join(left)}")
        operations = [
            *(CommitOperationDelete(name) for name in left),
            *(
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in planned.files.items()
            ),
        ]
        done = api.create_commit(
            settings.name, operations, commit_message=settings.message or MESSAGE, revision=settings.revision
        )
    return str(done.commit_url)


def _make_repository(api, settings: PushSettings) -> None:
    """Make the repository where there is none; one that is there must be as open as was asked for.

    Raises:
        HubError: it is more open, or less.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        private = api.model_info(settings.name).private
    except RepositoryNotFoundError as error:
        if status_of(error) == 401:
            raise
        api.create_repo(settings.name, private=not settings.public)
        return
    if not private and not settings.public:
        raise HubError(
            f"{settings.name} is on the hub already, for everybody to read, and a push is private unless `public=True` "
            "is given: give it, or choose another name"
        )
    if private and settings.public:
        why = f"on {settings.name}, which is on the hub already and private; its settings page there changes that"
        raise HubError(without_effect("`public=True`", why))


@contextmanager
def _refusals(name: str, secret: str) -> Iterator[None]:
    """Let whatever the hub, its library or the network refuse be one message without the token.

    Raises:
        HubError: says what it means.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # of the hub's library, its HTTP client and hf_xet
        reason = why_not_written(error).replace(secret, "…")
        raise HubError(f"{name} was not pushed: {reason}") from None
