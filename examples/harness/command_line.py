"""Command lines that answer a mistyped name with the nearest one there is."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

# What options were called before; the old names are taken, and warned about.
RENAMED = {"rows": "norm_batch_size"}


class Parser(argparse.ArgumentParser):
    """A parser that describes a script as written, and suggests the nearest option."""

    def __init__(self, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads the command line, old names of options as well."""
        args = list(sys.argv[1:] if args is None else args)
        for i, argument in enumerate(args):
            option, *value = argument.split("=", 1)
            for old, new in RENAMED.items():
                if option == f"--{old}":
                    option = f"--{new.replace('_', '-')}"
                    print(f"{self.prog}: --{old} is now {option}", file=sys.stderr)
                    args[i] = "=".join([option, *value])
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the program with a message."""
        if found := re.match("unrecognized arguments: (--[^ =]+)", message):
            options = re.findall(r"--[\w-]+", self.format_usage())
            message += suggestion(found[1], options)
        super().error(message)


def add_names(
    group: Any, option: str, names: Iterable[str], default: Iterable[str] | None = None
) -> None:
    """Adds an option that takes any of some names, all of them by default."""
    names = tuple(names)
    chosen = names if default is None else tuple(default)
    shown = "all" if chosen in (names, ()) else ", ".join(chosen)
    group.add_argument(
        option,
        nargs="+",
        type=one_of(names),
        default=list(chosen),
        metavar="NAME",
        help=f"any of {', '.join(names)} (default: {shown})",
    )


def suggestion(text: str, names: Iterable[str]) -> str:
    """Returns a question after the nearest of some names, if one is near.

    Example:
      >>> suggestion("ResNet-8", ["resnet8", "resnet20"])
      '. Did you mean resnet8?'
    """
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(text.lower(), lower, 1)
    return f". Did you mean {lower[close[0]]}?" if close else ""


def unknown(what: str, text: str, names: Iterable[str]) -> str:
    """Returns a complaint about a name: with the nearest, or else all there are.

    Example:
      >>> unknown("a color", "grene", ["red", "green"])
      "Expected a color, got 'grene'. Did you mean green?"
      >>> unknown("a color", "dark", ["red", "green"])
      "Expected a color among red, green, got 'dark'."
    """
    names = tuple(names)
    if near := suggestion(text, names):
        return f"Expected {what}, got {text!r}{near}"
    return f"Expected {what} among {', '.join(names)}, got {text!r}."


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """Returns the type of an argument that is one of some names."""

    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(unknown("a name", text, names))
        return text

    return name
