"""What the scripts are made of: data, methods, the training step, loops, results."""

import sys
from types import TracebackType

# What the scripts import and the library does not.
_EXTRA = (
    *("PIL", "array_record", "google", "grain"),
    *("matplotlib", "orbax", "sklearn", "tensorboard"),
)


def _in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Shows a missing optional package, and Ctrl-C, in one line; else a traceback."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if name and name.partition(".")[0] in _EXTRA:
        print(f"{error}: pip install '.[examples]'", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _in_one_line
