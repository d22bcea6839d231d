"""The windows of recordings as ATIF documents, one a window, each naming the next."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from klong_jax.core.errors import UserError
from klong_jax.splitting.plan import TrajectoryPlan
from klong_jax.text.formats import Recording, write_atif


def check_windows_folder(folder: Path) -> None:
    """Refuses a folder that holds something, since its windows would mix with ours.

    Raises:
        UserError: It does, or is no folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"windows={folder}: is there already; name a new or an empty folder.")


def write_windows(
    folder: Path, number: int, recording: Recording, pinned_messages: int, plan: TrajectoryPlan
) -> None:
    """Writes each window of a recording as `NUMBER-WINDOW.json`.

    A step is marked as copied context if an earlier window trains it, or shows it if nobody said
    it. Texts stand whole; `meta["window"]` says which turns' were shortened to fit, and how many
    tokens of others faded.

    Args:
        folder: Where to.
        number: The recording's position.
        recording: The recording.
        pinned_messages: Messages that every window keeps.
        plan: How it was split.
    """
    windows = list(_windows(recording, pinned_messages, plan))
    names = [f"{number:05d}-{index:03d}.json" for index in range(len(windows))]
    for name, following, window in zip(names, [*names[1:], ""], windows, strict=True):
        write_atif(folder / name, window, continued_in=following)


def _windows(
    recording: Recording, pinned_messages: int, plan: TrajectoryPlan
) -> Iterator[Recording]:
    """Each window as a recording."""
    messages, untrained = recording.messages, frozenset(recording.untrained)
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    begins = [0, *(answer + 1 for answer in answers)]
    for window in plan.windows:
        first, last = window.first_trained_turn, window.last_trained_turn
        # The first window's turns are all its own, pinned ones too.
        pinned = pinned_messages if window.index else 0
        shown = max(begins[first - window.context_turns], pinned)
        fresh = max(begins[first], pinned) if window.index else 0
        about = {
            "index": window.index,
            "count": len(plan.windows),
            "faded_tokens": window.faded_tokens,
            "cut_turns": [turn for turn in plan.cut_turns if first <= turn <= last],
        }
        places = [*range(pinned), *range(shown, answers[last] + 1)]
        copied = pinned + fresh - shown
        yield replace(
            recording,
            messages=tuple(messages[place] for place in places),
            pinned_messages=min(pinned_messages, answers[last] + 1),
            untrained=tuple(
                number
                for number, place in enumerate(places)
                if number < copied or place in untrained
            ),
            meta={**recording.meta, "window": about},
        )
