"""The experts of a server by name, while they come, go, and are replaced under requests that still weigh them."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lmoe.blend.blend import Blend
from lmoe.errors import BlendError, LmoeError
from lmoe.files.places import expanded
from lmoe.generate.speaker import digest_of_adapter
from lmoe.peft.reader import read_header
from lmoe.serve.expert_names import name_problem
from lmoe.serve.request import ExpertState, Refused, RefusedError

T = TypeVar("T")
PATH = re.compile(r"(?<![\w.])~?/[^\s:;,'\"`)]+")


@dataclass(slots=True, eq=False)
class Version:
    """One state of an expert.

    Args:
        key: its name in the blend, which no other version has.
        place: where it is read from.
        digest: of its files when they were first read; other files are not taken for it.
        rank: largest of its sites.
        number: of the version, from 1.
        loaded: whether the blend has it.
        requests: that weigh it.
        before: the version that it has replaced, while there is a way back to it.
    """

    key: str
    place: str
    digest: str
    rank: int
    number: int = 1
    loaded: bool = True
    requests: int = 0
    before: "Version | None" = field(default=None, repr=False)


class Shelf:
    """Versions of experts by name. All methods run on the event loop; what takes time runs elsewhere, one at a time.

    Args:
        blend: that has them.
        elsewhere: runs a function of no arguments in the thread that changes the model.
    """

    def __init__(self, blend: Blend, elsewhere: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self.blend, self._elsewhere = blend, elsewhere
        self._changing = asyncio.Lock()
        self._made = 0
        self._keys = set(blend.names)
        self._retired: set[Version] = set()
        self._work: set[asyncio.Task[Any]] = set()
        self.current: dict[str, Version] = {}
        for name, folder in blend.folders.items():
            self.current[name] = Version(name, str(folder.absolute()), digest_of_adapter(folder), blend.ranks[name])

    def states(self) -> list[ExpertState]:
        """Every expert, in the order in which they came."""
        return [
            ExpertState(
                name=name,
                loaded=version.loaded,
                requests=sum(one.requests for one in _line(version)),
                version=version.number,
                can_roll_back=version.before is not None,
                rank=version.rank,
            )
            for name, version in self.current.items()
        ]

    def folders(self) -> set[Path]:
        """Where the experts, and those that can be gone back to, are read from."""
        return {Path(one.place) for version in self.current.values() for one in _line(version)}

    async def hold(self, names: Iterable[str]) -> dict[str, Version]:
        """The versions that a request weighs from now on, loaded; to be let go with `release`.

        Raises:
            RefusedError: no such expert, or one whose files are not there any more.
        """
        held = {name: self._known(name) for name in names}
        for version in held.values():
            version.requests += 1
        try:
            for name, version in held.items():
                if not version.loaded:
                    await self._whole(self._load_once(name, version))
        except BaseException:
            self.release(held.values())
            raise
        return held

    async def _whole(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work to its end, though who asked for it goes away: a part of it would be neither."""
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._done)
        await asyncio.shield(task)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._work.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it

    async def _load_once(self, name: str, version: Version) -> None:
        async with self._changing:
            if not version.loaded:
                await self._load(name, version)

    def release(self, held: Iterable[Version]) -> None:
        """A request is over that has held these."""
        for version in held:
            version.requests -= 1

    async def sweep(self) -> None:
        """Take those out of the model that were replaced or removed and are weighed by no request any more."""
        if any(not version.requests for version in self._retired):
            await self._whole(self._drop_idle())

    async def _drop_idle(self) -> None:
        async with self._changing:
            for version in [one for one in self._retired if not one.requests]:
                if not version.requests:
                    self._retired.discard(version)
                    await self._drop(version)

    async def add(self, name: str, place: str) -> None:
        """Add one more expert.

        Raises:
            RefusedError: its name, or what is at the place.
        """
        async with self._changing:
            self._free(name)
            self.current[name] = await self._new(place)

    async def replace(self, name: str, place: str) -> None:
        """Another expert under a name; the one before can be gone back to.

        Raises:
            RefusedError: no such name, or what is at the place.
        """
        async with self._changing:
            before = self._known(name)
            new = await self._new(place)
            self._follow(name, new, before)

    async def roll_back(self, name: str) -> None:
        """The version before the one that is there now.

        Raises:
            RefusedError: no such name, no such version, or its files are gone.
        """
        async with self._changing:
            now = self._known(name)
            back = now.before
            if back is None:
                raise RefusedError(Refused.conflict, f"{name}: there is no earlier version to go back to")
            if not back.loaded:
                await self._load(name, back)
            self._retired.discard(back)
            self._follow(name, back, now)

    async def rename(self, name: str, new: str) -> None:
        """Give an expert another name.

        Raises:
            RefusedError: no such name, or one that is taken or cannot be.
        """
        async with self._changing:
            self._known(name)
            if new != name:
                self._free(new)
            self.current = {new if other == name else other: version for other, version in self.current.items()}

    async def remove(self, name: str) -> None:
        """Take an expert away; its tensors go with the next `sweep`.

        Raises:
            RefusedError: no such name.
        """
        async with self._changing:
            self._retired |= set(_line(self._known(name)))
            del self.current[name]

    async def unload(self, name: str) -> None:
        """Drop an idle expert's tensors.

        Raises:
            RefusedError: no such name, or requests weigh it.
        """
        async with self._changing:
            version = self._known(name)
            if version.requests:
                raise RefusedError(Refused.conflict, f"{name}: {version.requests} requests weigh it now")
            await self._drop(version)

    async def _drop(self, version: Version) -> None:
        """Take a version's tensors out of the model; who asks for it from here on has it loaded again."""
        if version.loaded:
            version.loaded = False
            await self._elsewhere(lambda: self.blend.remove(version.key))

    def _follow(self, name: str, new: Version, before: Version) -> None:
        """Let a version stand in the place of another one, which alone can be gone back to."""
        for older in _line(before)[1:]:
            if older is not new:
                self._retired.add(older)
        before.before = None
        new.before, new.number = before, before.number + 1
        self._retired.add(before)  # out of the model when it is idle; its files bring it back
        self.current[name] = new

    async def _new(self, place: str) -> Version:
        key, folders = self._key(), [Path(place)]

        def read() -> Version:
            header = read_header(place, self.blend.model, base=self.blend.base)
            folders.append(header.folder)
            digest = digest_of_adapter(header.folder)
            self.blend.add(key, header.folder)
            return Version(key, str(header.folder.absolute()), digest, header.largest_rank)

        version = await self._asked(read, "the expert", folders)
        if key in self.blend.unfitted:
            await self._elsewhere(lambda: self.blend.remove(key))
            raise RefusedError(
                Refused.invalid, "router=encoder does not know what this expert is for: it has no centroid beside it"
            )
        return version

    async def _load(self, name: str, version: Version) -> None:
        def read() -> None:
            if digest_of_adapter(Path(version.place)) != version.digest:
                raise BlendError("its files have changed since they were first read: replace the expert")
            self.blend.add(version.key, version.place)

        await self._asked(read, f"expert {name}", [Path(version.place)])
        version.loaded = True

    async def _asked(self, action: Callable[[], T], what: str, folders: Sequence[Path]) -> T:
        """What an action returns; why it refuses goes to the client without the paths of this machine.

        Args:
            folders: that the action reads, whatever their names.

        Raises:
            RefusedError: it refuses.
        """
        with refusing(f"{what} cannot be used: ", folders):
            return await self._elsewhere(action)

    def _key(self) -> str:
        while True:
            self._made += 1
            key = f"expert {self._made}"
            if key not in self._keys:
                self._keys.add(key)
                return key

    def _known(self, name: str) -> Version:
        if name not in self.current:
            known = ", ".join(self.current) or "none"
            raise RefusedError(Refused.unknown_expert, f"there is no expert {name!r}; there are {known}")
        return self.current[name]

    def _free(self, name: str) -> None:
        if (problem := name_problem(name)) is not None:
            raise RefusedError(Refused.invalid, problem, "name")
        if name in self.current:
            raise RefusedError(
                Refused.conflict, f"there is an expert {name!r} already; replace it, or remove it", "name"
            )


@contextmanager
def refusing(head: str = "", folders: Sequence[Path] = ()) -> Iterator[None]:
    """Refuse a request where something inside the block cannot be, without the paths of this machine.

    Args:
        head: of the message.
        folders: as for `without_paths`.

    Raises:
        RefusedError: in place of every other error for users.
    """
    try:
        yield
    except RefusedError:
        raise
    except LmoeError as error:
        raise RefusedError(Refused.invalid, head + without_paths(str(error), folders)) from error


def without_paths(text: str, folders: Sequence[Path] = ()) -> str:
    """A message without what looks like a path of this machine.

    Args:
        folders: that it may name, in whose names there may be blanks.
    """
    for folder in folders:
        for form in (folder, expanded(str(folder))):
            if form.is_absolute():
                text = re.sub(rf"{re.escape(str(form))}(/[^\s:;,'\"`)]*)?", "(a file)", text)
    return PATH.sub("(a file)", text)


def _line(version: Version) -> list[Version]:
    """A version and those before it."""
    found, one = [], version
    while one is not None and one not in found:
        found.append(one)
        one = one.before
    return found
