"""What an error that crossed processes says, without Ray's wrapping.

What an actor raises arrives as a child of the error's class whose text is the traceback of the
other process; the error itself is its `cause`. Ray is imported only where an actor's death is to be
told from other errors: commands that start no Ray explain errors too.
"""

from __future__ import annotations

_CREATION = "raised in its creation task"
"""What Ray says of an actor whose `__init__` raised."""


def plain(error: BaseException) -> BaseException:
    """The error as it was raised, in whatever process."""
    return getattr(error, "cause", None) or error


def describe(error: BaseException) -> str:
    """Type and message of an error as it was raised."""
    inner = plain(error)
    return f"{type(inner).__name__}: {inner}"


def cause(error: BaseException) -> str:
    """Why an actor cannot be used, in a line for people, without a traceback."""
    from ray.exceptions import RayActorError

    if plain(error) is not error:
        return describe(error)
    text = str(error).strip()
    if _CREATION in text:
        # A traceback of the other process, whose last lines are the error.
        lines = text.splitlines()
        frames = [number for number, line in enumerate(lines) if line.startswith(" ")]
        return " ".join(" ".join(lines[frames[-1] + 1 if frames else 0 :]).split())
    if isinstance(error, RayActorError):
        # Before this Ray says which actor, behind it what kills processes in general.
        said = text.partition("The actor is dead because ")[2] or text
        return " ".join(said.partition("Some common causes")[0].split())[:300]
    return text.splitlines()[-1] if text else type(error).__name__
