"""The words of a command before typer reads them: former names of options, and values that follow each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand

# Typer carries click inside, or imports it, by its version; either way these are the bases of a wrong command line.
CLICK_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")
SETTINGS_TOO = ("method", "eta")  # options of sample that a schedule has as fields as well

Words = list[str]
Fits = Callable[[str], bool]  # whether a word can be a further value


class Command(TyperCommand):
    """A command whose options keep their former names, and some of which take more than one value."""

    former: ClassVar[Mapping[str, str]] = {}
    several: ClassVar[Mapping[str, Fits]] = {}

    def parse_args(self, ctx: Any, args: Words) -> Words:
        args = joined(renamed(args, self.former), self.several)
        try:
            rest = super().parse_args(ctx, list(args))
        except USAGE_ERROR as error:
            option = getattr(error, "option_name", None)
            if self.name != "train" or type(error).__name__ != "NoSuchOption" or option is None:
                raise
            value = next((b for a, b in pairwise(args) if a == option and not b.startswith("-")), "VALUE")
            name = option.lstrip("-").replace("-", "_")
            raise USAGE_ERROR(f"No such option: {option}. Settings go by --set, such as --set {name}={value}") from None
        for setting in ctx.params.get("settings") or ():
            self._check_setting(*setting.partition("=")[::2])
        return rest

    def _check_setting(self, name: str, value: str) -> None:
        """A usage error for what is no setting of a model but an option of this command."""
        word = name.replace("-", "_")
        word = {"batch": "batch_size"}.get(word, word)
        if word in SETTINGS_TOO or self.name == "train":  # whose settings are more than a model's
            return
        for parameter in self.params:
            if parameter.name == word and parameter.opts[0].startswith("-"):
                is_flag = getattr(parameter, "is_flag", False)
                option = parameter.opts[0] + ("" if is_flag else f" {value}")
                raise USAGE_ERROR(f"--set {name}={value}: {name} is no setting of the model but an option: {option}")


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
