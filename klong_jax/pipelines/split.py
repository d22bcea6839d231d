"""`klong split`: the chunking plan of recorded trajectories, as a table and as JSON."""

import statistics
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console
from rich.progress import track
from rich.table import Table

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import write_json
from klong_jax.pipelines.config.commands import SplitConfig
from klong_jax.pipelines.corpus import draw_corpus, stats_document, stats_table
from klong_jax.pipelines.dialect import make_dialect, remarks
from klong_jax.pipelines.windows import check_windows_folder, write_windows
from klong_jax.sft.recorded import split_messages
from klong_jax.splitting.pinning import pinned_messages
from klong_jax.splitting.plan import TrajectoryPlan, plan_recorded
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.splitting.recorded import DEFAULT_OPTIONS, SplitOptions, SplitRecording
from klong_jax.splitting.stats import TrainedByPosition
from klong_jax.text.dialect import Dialect
from klong_jax.text.formats import Recording, read_recordings
from klong_jax.text.tokenizer import bundled_tokenizer, load_tokenizer

_SHOWN_WINDOWS = 12
_SHOWN_REMARKS = 6


def run(config: SplitConfig) -> None:
    """Reads, plans, prints and, where asked, writes the plan and draws the corpus."""
    console = Console()
    path = config.tokenizer.path
    tokenizer = load_tokenizer(path) if path else bundled_tokenizer()
    if path is None:
        console.print(
            "Counting tokens with the small bundled tokenizer; "
            "tokenizer.path=FILE takes your model's own.",
            style="dim",
        )
    if config.windows:
        check_windows_folder(config.windows)
    chat = make_dialect(config.tokenizer, tokenizer)
    plans: list[TrajectoryPlan] = []
    skipped: list[str] = []
    limit = config.splitting.context_limit
    trained = TrainedByPosition(limit)
    for recording, made in _split_all(config, chat, console, skipped):
        plan = _plan(chat, recording, made)
        if config.windows:
            pinned = _pinned(chat, recording, config.splitting.options())
            write_windows(config.windows, len(plans), recording, pinned, plan)
        plans.append(plan)
        if config.plot:
            trained.add(made.windows())
    if not plans:
        raise UserError(f"{config.data.path}: holds no usable trajectory; check the file.")
    if config.stats:
        console.print(stats_table(plans, limit))
    else:
        _print(console, plans)
    _print_remarks(console, plans)
    for line in skipped:
        console.print(f"skipped: {line}", style="yellow", markup=False)
    if config.output:
        write_json(config.output, _document(config, plans, skipped))
        console.print(f"plan written to {config.output}", markup=False)
    if config.windows:
        console.print(f"windows written to {config.windows}", markup=False)
    if config.plot:
        draw_corpus(config.plot, config.data.path, plans, limit, trained)
        console.print(f"plot written to {config.plot}", markup=False)


def _split_all(
    config: SplitConfig, chat: Dialect, console: Console, skipped: list[str]
) -> Iterator[tuple[Recording, SplitRecording]]:
    policy, options = config.splitting.policy(), config.splitting.options()
    recordings = list(
        read_recordings(config.data.path, skip_bad=config.data.skip_bad, on_skip=skipped.append)
    )
    for recording in track(recordings, "splitting", console=console, transient=True):
        try:
            made = split_recording(chat, recording, policy, options)
        except UserError as error:
            if not config.data.skip_bad:
                raise
            skipped.append(str(error))
        else:
            yield recording, made


def split_recording(
    chat: Dialect,
    recording: Recording,
    policy: ContextPolicy,
    options: SplitOptions = DEFAULT_OPTIONS,
) -> SplitRecording:
    """Splits one recording as the agent would have seen it.

    Raises:
        UserError: The pinned prefix or an assistant turn does not fit; names the recording.
    """
    pinned = _pinned(chat, recording, options)
    return split_messages(
        chat,
        recording.messages,
        pinned,
        policy,
        recording.source,
        options,
        frozenset(recording.untrained),
    )


def _pinned(chat: Dialect, recording: Recording, options: SplitOptions) -> int:
    if options.mode == "sliding_no_pin":
        return 0
    return pinned_messages(
        recording.messages,
        options.pin,
        recording.pinned_messages,
        lambda front: chat.turns(front, len(front))[1],
    )


def plan_recording(
    chat: Dialect,
    recording: Recording,
    policy: ContextPolicy,
    options: SplitOptions = DEFAULT_OPTIONS,
) -> TrajectoryPlan:
    """Splits one recording and describes its windows; raises as `split_recording` does."""
    return _plan(chat, recording, split_recording(chat, recording, policy, options))


def _plan(chat: Dialect, recording: Recording, made: SplitRecording) -> TrajectoryPlan:
    plan = plan_recorded(recording.recording_id, recording.source, made)
    return replace(plan, remarks=remarks(chat, recording.messages, (*made.turns, *made.dropped)))


def _print(console: Console, plans: list[TrajectoryPlan]) -> None:
    for plan in plans[:3]:
        table = Table(
            title=f"{plan.trajectory_id}: {plan.turns} turns, {plan.stream_tokens} tokens"
        )
        for name in ("window", "tokens", "pinned", "overlap", "history from", "to", "trains turns"):
            table.add_column(name, justify="right")
        table.add_column("trained tokens", justify="right")
        for row in _rows(plan):
            table.add_row(*row)
        console.print(table)
    if len(plans) > 3:
        console.print(f"... and {len(plans) - 3} more trajectories; output=FILE writes them all")
    windows = [window for plan in plans for window in plan.windows]
    console.print(
        f"{len(plans)} trajectories, {len(windows)} windows "
        f"(median {statistics.median(w.length for w in windows):.0f} tokens), "
        f"{sum(plan.trained_tokens for plan in plans)} trained tokens, "
        f"{sum(len(plan.cut_turns) for plan in plans)} turns cut to fit"
    )
    if dropped := sum(plan.dropped_tokens for plan in plans):
        lost = sum(plan.output_tokens - plan.trained_tokens for plan in plans)
        console.print(
            f"dropped at the ends: {sum(plan.dropped_turns for plan in plans)} turns, "
            f"{dropped} tokens, {lost} of them the assistant's and so untrained"
        )
    if faded := sum(window.faded_tokens for window in windows):
        console.print(f"faded in what windows carry over: {faded} tokens of tool output")


def _print_remarks(console: Console, plans: list[TrajectoryPlan]) -> None:
    lines = [f"{plan.trajectory_id}: {line}" for plan in plans for line in plan.remarks]
    for line in lines[:_SHOWN_REMARKS]:
        console.print(line, style="yellow", markup=False)
    if len(lines) > _SHOWN_REMARKS:
        more = len(lines) - _SHOWN_REMARKS
        console.print(f"... and {more} more such lines; output=FILE writes them all")


def _rows(plan: TrajectoryPlan) -> Iterator[list[str]]:
    for window in plan.windows[:_SHOWN_WINDOWS]:
        yield [
            str(window.index),
            str(window.length),
            str(window.prefix_tokens),
            str(window.overlap_tokens),
            str(window.start),
            str(window.end),
            f"{window.first_trained_turn}-{window.last_trained_turn}",
            str(window.trained_tokens),
        ]
    if len(plan.windows) > _SHOWN_WINDOWS:
        yield [f"... {len(plan.windows) - _SHOWN_WINDOWS} more", *[""] * 7]


def _document(
    config: SplitConfig, plans: list[TrajectoryPlan], skipped: list[str]
) -> dict[str, object]:
    return {
        "source": str(config.data.path),
        **config.splitting.model_dump(),
        **(
            {"stats": stats_document(plans, config.splitting.context_limit)} if config.stats else {}
        ),
        "trajectories": [plan.to_json() for plan in plans],
        "skipped": skipped,
    }
