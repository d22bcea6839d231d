"""What `klong split` says about a corpus as a whole: the table of --stats, and the plot."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from klong_jax.core.jsonio import write_text
from klong_jax.models.cost import prefix_sharing_flops
from klong_jax.models.presets import preset
from klong_jax.report.corpus import CorpusFigures, corpus_html, corpus_svg
from klong_jax.splitting.plan import TrajectoryPlan
from klong_jax.splitting.stats import CorpusStats, Spread, TrainedByPosition, corpus_stats

_MODELS = ("qwen3_0_6b", "qwen3_8b")


def stats_document(plans: Sequence[TrajectoryPlan], limit: int) -> dict[str, Any]:
    """The statistics as a JSON object."""
    stats = corpus_stats(plans, limit)
    return {
        **asdict(stats),
        "trained_share": stats.trained_share,
        "prefix_share": stats.prefix_share,
        "padding_share": stats.padding_share,
        "packed_padding_share": stats.packed_padding_share,
        "prefix_sharing_speedup": {name: sharing_speedup(plans, name) for name in _MODELS},
    }


def stats_table(plans: Sequence[TrajectoryPlan], limit: int) -> Table:
    """The statistics as a table, a quantity a row."""
    stats = corpus_stats(plans, limit)
    table = Table(title=f"{stats.trajectories} trajectories")
    table.add_column("")
    for name in ("in all", "median", "p90", "largest"):
        table.add_column(name, justify="right")
    spreads = {
        "turns a trajectory": stats.turns,
        "tokens a trajectory": stats.tokens,
        "windows a trajectory": stats.windows,
        "tokens a window": stats.window_tokens,
    }
    for label, spread in spreads.items():
        table.add_row(label, *_cells(spread))
    table.add_section()
    for label, share in _shares(stats).items():
        table.add_row(label, share)
    table.add_section()
    table.add_row(f"padding in rows of {limit:,}, one window each", f"{stats.padding_share:.1%}")
    table.add_row("padding if short windows share rows", f"{stats.packed_padding_share:.1%}")
    table.add_section()
    for name in _MODELS:
        table.add_row(f"prefix sharing, {name}", f"{sharing_speedup(plans, name):.2f}x")
    table.caption = (
        "padding: its share of the positions that training computes, with all windows laid out at "
        "once; a step packs its own\n"
        "prefix sharing: operations of training with the pinned prefix computed in every window, "
        "over those with it computed once a trajectory; counted, not measured"
    )
    return table


def sharing_speedup(plans: Sequence[TrajectoryPlan], model: str) -> float:
    """How many times fewer operations it takes to compute each trajectory's prefix once."""
    config = preset(model)
    naive = shared = 0.0
    for plan in plans:
        prefix = plan.windows[0].prefix_tokens
        fresh = [window.length - prefix for window in plan.windows]
        apart, once = prefix_sharing_flops(config, prefix, fresh)
        naive, shared = naive + apart, shared + once
    return naive / shared


def draw_corpus(
    path: Path,
    source: Path,
    plans: Sequence[TrajectoryPlan],
    limit: int,
    trained: TrainedByPosition,
) -> None:
    """Draws the corpus into an .svg file, or into a page around the drawings."""
    stats = corpus_stats(plans, limit)
    figures = CorpusFigures(
        title=f"{source.name}: {stats.trajectories} trajectories, {stats.windows.total} windows",
        sentence=(
            f"{stats.trained_share:.1%} of the tokens in windows are trained, "
            f"{stats.prefix_share:.1%} are pinned prefix."
        ),
        windows=tuple(len(plan.windows) for plan in plans),
        tokens=tuple(plan.stream_tokens for plan in plans),
        trained=trained.points(),
    )
    write_text(path, corpus_svg(figures) if path.suffix == ".svg" else corpus_html(figures))


def _cells(spread: Spread) -> tuple[str, ...]:
    return tuple(
        f"{value:,}" for value in (spread.total, spread.median, spread.p90, spread.largest)
    )


def _shares(stats: CorpusStats) -> dict[str, str]:
    return {
        "trained tokens": f"{stats.trained_tokens:,}",
        "trained share of window tokens": f"{stats.trained_share:.1%}",
        "pinned share of window tokens": f"{stats.prefix_share:.1%}",
        "tokens faded in what is carried over": f"{stats.faded_tokens:,}",
        "turns cut to fit": f"{stats.cut_turns:,}",
        "tokens cut": f"{stats.cut_tokens:,}",
        "turns dropped at the end": f"{stats.dropped_turns:,}",
        "tokens dropped": f"{stats.dropped_tokens:,}",
        "of them the assistant's": f"{stats.untrained_tokens:,}",
    }
