"""The words of a command before typer reads them: former names of options, and values that follow each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from typer.core import TyperCommand

Words = list[str]
Fits = Callable[[str], bool]  # whether a word can be a further value


class Command(TyperCommand):
    """A command whose options keep their former names, and some of which take more than one value."""

    former: ClassVar[Mapping[str, str]] = {}
    several: ClassVar[Mapping[str, Fits]] = {}

    def parse_args(self, ctx: Any, args: Words) -> Words:
        return super().parse_args(ctx, joined(renamed(args, self.former), self.several))


def command_class(
    former: Mapping[str, str] | None = None,  # {"--batch": "--batch-size"}: not in the help, and understood for ever
    several: Mapping[str, Fits] | None = None,
) -> type[Command]:
    """`Command` with these names."""
    return type("Command", (Command,), {"former": former or {}, "several": several or {}})


def renamed(words: Words, former: Mapping[str, str]) -> Words:
    """["--batch", "4", "--batch=4"] -> ["--batch-size", "4", "--batch-size=4"]: former names become today's."""
    result: Words = []
    for word in words:
        name, equals, value = word.partition("=")
        result.append(former[name] + equals + value if name in former else word)
    return result


def joined(words: Words, several: Mapping[str, Fits]) -> Words:
    """["--batch-size", "1", "4", "x"] -> ["--batch-size", "1,4", "x"]: the values of an option become one word.

    They end before the first word that does not fit."""
    result: Words = []
    fits: Fits | None = None  # of the option whose values are being read
    first = False
    for word in words:
        if first:  # an option's own value, whatever it looks like
            result.append(word)
            first = False
            fits = None if word.startswith("-") else fits
        elif fits is not None and fits(word):
            result[-1] += "," + word
        else:
            name, equals, _ = word.partition("=")
            fits = several.get(name)
            first = fits is not None and not equals
            result.append(word)
    return result
