"""What the scripts are made of: data, methods, the training step, loops, results."""

import sys
from types import TracebackType

# What the scripts import and the library does not, and the option that installs it.
_EXTRAS = {
    **dict.fromkeys(("PIL", "array_record", "google", "grain"), "examples"),
    **dict.fromkeys(("matplotlib", "orbax", "sklearn", "tensorboard"), "examples"),
    "hypothesis": "test",
}


def _in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Shows a missing optional package, and Ctrl-C, in one line; else a traceback."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if extra := _EXTRAS.get((name or "").partition(".")[0]):
        print(f"{error}: pip install '.[{extra}]'", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _in_one_line
