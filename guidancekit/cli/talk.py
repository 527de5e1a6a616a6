"""What commands say while they run: bars, notes and warnings on stderr, file names on stdout."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress(
    total: int | None, pipe: Any = None, unit: str = "picture"
) -> Iterator[Callable[..., None]]:
    """A bar over pictures, on a terminal only, or a count where the total is unknown.

    `advance(line)` counts one and prints the line.
    """
    from tqdm import tqdm

    if pipe is not None:
        show_steps(pipe)
    with tqdm(total=total, unit=unit, disable=None, leave=False) as bar:

        def advance(line: str | None = None) -> None:
            bar.update()
            if line is not None:
                tqdm.write(line)
                sys.stdout.flush()  # whole lines, also where several processes write

        yield advance


def show_steps(pipe: Any) -> None:
    """Let the pipeline show a bar over its steps, on a terminal only."""
    pipe.set_progress_bar_config(disable=None, leave=False, unit="step")


def note(text: str) -> None:
    """What is worth knowing about the result; only its name goes to stdout."""
    print(f"guidancekit: {text}", file=sys.stderr)


def warn(text: str) -> None:
    """What the user should look at, though the command goes on."""
    print(f"guidancekit: warning: {text}", file=sys.stderr)


def warn_unknown_words(pipe: Any, prompts: Sequence[str]) -> None:
    """Say which words the model has never seen, and which it knows."""
    from ..loading import known_words, unknown_words

    unknown = list(dict.fromkeys(word for p in prompts for word in unknown_words(pipe, p)))
    if unknown:
        known = known_words(pipe)
        where = " ".join(known) if len(known) <= 200 else "see the tokenizer folder of the model"
        warn(f"the model does not know {', '.join(map(repr, unknown))}. Its words: {where}")


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Each of our own warnings once, as one line; none of the libraries below."""
    seen = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module="guidancekit")
        warnings.showwarning = show
        yield


def quiet_libraries() -> None:
    """No log lines and loading bars of the libraries below."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
