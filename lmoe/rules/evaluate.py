"""Problems of what `lmoe evaluate` is asked for."""

from lmoe.config.evaluate import MAX_NEW_TOKENS, NO_DATA, EvaluateSettings
from lmoe.errors import ConfigError
from lmoe.rules.routers import ROUTERS, Need, routers_that_need
from lmoe.vocabulary import Prompts, RouterKind


def check_exported(settings: EvaluateSettings) -> None:
    """Refuse what was asked for and cannot act on a model that was exported.

    Raises:
        ConfigError: everything that was asked for and cannot act.
    """
    of_checkpoints = {
        "choices": settings.choices is not None,
        "task": settings.task is not None,
        "samples": settings.samples > 0,
        "max_new_tokens": settings.max_new_tokens != MAX_NEW_TOKENS,
        "tasks": bool(settings.tasks),
        "task_path": settings.task_path is not None,
        "prompts": settings.prompts is not Prompts.auto,
        "domain": settings.domain is not None,
    }
    problems = [
        f"`{name}={getattr(settings, name)}` is for `checkpoint` alone; with `model` losses are measured, beside those "
        "of its run"
        for name, given in of_checkpoints.items()
        if given
    ]
    if settings.data == NO_DATA:
        problems.append("`data=none` leaves nothing to measure with `model`")
    if problems:
        raise ConfigError(problems)


def check_settings(settings: EvaluateSettings, router: str) -> None:
    """Refuse what was asked for and cannot act on this checkpoint.

    Args:
        router: moe.router of the checkpoint.

    Raises:
        ConfigError: everything that was asked for and cannot act.
    """
    questions, problems = bool(settings.choices or settings.tasks), []
    by_domain = router in tuple(RouterKind) and ROUTERS[RouterKind(router)].needs is Need.domain
    if settings.data == NO_DATA and not questions:
        problems.append("`data=none` without `choices` and `tasks` leaves nothing to measure")
    if settings.data == NO_DATA and settings.samples:
        problems.append(f"`samples={settings.samples}`: their prompts are those of the rows, and `data=none` has none")
    if settings.data == NO_DATA and settings.task is not None:
        problems.append(f"`task={settings.task}` says how rows are measured, and `data=none` has none")
    if settings.max_new_tokens != MAX_NEW_TOKENS and not settings.samples:
        problems.append(f"`max_new_tokens={settings.max_new_tokens}` is for `samples=N`, which was not given")
    if settings.task_path and not settings.tasks:
        problems.append(f"`task_path={settings.task_path}` is for `tasks=NAME,…`, which was not given")
    if settings.prompts is not Prompts.auto and not questions:
        problems.append(f"`prompts={settings.prompts}` is for `choices` and `tasks`, and neither was given")
    if settings.domain and not (by_domain and questions):
        why = f"this checkpoint has moe.router={router}" if not by_domain else "neither was given; rows name their own"
        named = routers_that_need(Need.domain)
        problems.append(f"`domain={settings.domain}` is for `choices` and `tasks` with moe.router={named}; {why}")
    if by_domain and questions and not settings.domain:
        problems.append(
            f"moe.router={router} chooses the expert by the domain, and questions of `choices` and `tasks` have none; "
            "name one for all of them with `domain`, or leave both out"
        )
    if problems:
        raise ConfigError(problems)
