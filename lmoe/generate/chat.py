"""A conversation in which the knobs of a blend can be turned."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

from lmoe.blend.blend import Blend
from lmoe.config.named_values import named_places, named_weights
from lmoe.errors import ConfigError, LmoeError
from lmoe.generate.generate import Sampling, Turn
from lmoe.generate.speaker import Speaker

HELP = """\
/weights              the weights now          /weights code=0.7 chat=0.3   set them; names left out are 0
/experts              the experts              /add sql=DIR   /remove sql   /rename sql db
/sampling             how tokens are chosen    /sampling temperature=0.8 top_p=0.9
/system TEXT          what the model is told   /reset         forget the conversation
/help                 this                     /quit          or Ctrl-D"""


@dataclass(slots=True, kw_only=True)
class Chat:
    """Answers lines; those that begin with / are commands.

    Args:
        speaker: what answers.
        sampling: how.
        write: gets pieces of answers, and what commands say.
        message: what is said of an error.
        turns: the conversation so far.
    """

    speaker: Speaker
    sampling: Sampling
    write: Callable[[str], object]
    message: Callable[[LmoeError], str] = lambda error: error.without_config()
    turns: list[Turn] = field(default_factory=list)

    def line(self, text: str) -> bool:
        """Take a line of the user; False ends the chat. What is wrong with it is said, and changes nothing."""
        text = text.strip()
        if not text:
            return True
        if text in ("/quit", "/exit"):
            return False
        try:
            self._command(text) if text.startswith("/") else self._answer(text)
        except LmoeError as error:
            self.write(f"{self.message(error)}\n")
        except (RuntimeError, MemoryError) as error:  # no memory, scores that are no numbers
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.write(f"no answer: {reason}\n")
        return True

    def _answer(self, text: str) -> None:
        turns = [*self.turns, {"role": "user", "content": text}]
        answer = self.speaker.answer(turns, self.sampling, self.write)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        self.write("\n")

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        match name:
            case "/weights":
                self._weights(rest)
            case "/experts":
                self._experts()
            case "/add":
                self._add(named_places(rest))
                self._experts()
            case "/remove":
                self._blend().remove(rest)
                self._experts()
            case "/rename":
                old, _, new = rest.partition(" ")
                self._blend().rename(old, new.strip())
                self._experts()
            case "/sampling":
                self._set_sampling(rest)
            case "/system":
                kept = [turn for turn in self.turns if turn["role"] != "system"]
                self.turns = ([{"role": "system", "content": rest}] if rest else []) + kept
            case "/reset":
                self.turns = [turn for turn in self.turns if turn["role"] == "system"]
            case "/help":
                self.write(f"{HELP}\n")
            case _:
                raise ConfigError(f"{name}: no such command; /help lists them")

    def _blend(self) -> Blend:
        if self.speaker.blend is None:
            raise ConfigError("no experts are blended here; start with `model_name` and `experts`")
        return self.speaker.blend

    def _add(self, places: Mapping[str, str]) -> None:
        """More experts: all of them, or none where one cannot be had or no prompt could choose it."""
        blend = self._blend()
        added: list[str] = []
        try:
            for name, place in places.items():
                blend.add(name, place)
                added.append(name)
            if unknown := [name for name in added if name in blend.unfitted]:
                raise ConfigError(
                    f"`router=encoder` does not know what {', '.join(unknown)} is for: it has no centroid beside it; "
                    f"start with `fit` {unknown[0]}=ROWS, rows with prompts of its kind"
                )
        except LmoeError:
            for name in added:
                blend.remove(name)
            raise

    def _weights(self, rest: str) -> None:
        blend = self._blend()
        if rest:
            blend.weights = named_weights(rest, list(blend.names)) or {}
        weights = blend.weights
        for row in [weights] if isinstance(weights, dict) else weights:
            self.write("  ".join(f"{name}={weight:g}" for name, weight in row.items()) + "\n")

    def _experts(self) -> None:
        self.write(f"{', '.join(self._blend().names) or 'none'}\n")

    def _set_sampling(self, rest: str) -> None:
        known = {entry.name: type(getattr(self.sampling, entry.name)) for entry in fields(self.sampling)}
        changes = {}
        for part in rest.split():
            name, _, value = part.partition("=")
            if name not in known:
                raise ConfigError(f"sampling: no {name!r}; there are {', '.join(known)}")
            try:
                changes[name] = known[name](value)
            except ValueError:
                kind = "whole number" if known[name] is int else "number"
                raise ConfigError(f"sampling: {name}={value} is no {kind}") from None
        self.sampling = replace(self.sampling, **changes)
        values = {name: getattr(self.sampling, name) for name in known}
        shown = [f"{name}={value:g}" if known[name] is float else f"{name}={value}" for name, value in values.items()]
        self.write("  ".join(shown) + "\n")
