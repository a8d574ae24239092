"""What `mobilellm eval` prints of tasks: short names for the models, and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm.errors import UserError
from mobilellm.terminal.output import put

if TYPE_CHECKING:
    from mobilellm.report.score_table import Row
    from mobilellm.tasks.protocols import Sample


def labels(models: tuple[Path, ...]) -> list[str]:
    """A short name for each model: the last part of its path, or all of it where that is not
    unique."""
    names = [model.absolute().name for model in models]
    found = [
        name if names.count(name) == 1 else str(model)
        for name, model in zip(names, models, strict=True)
    ]
    if len(set(found)) < len(found):
        raise UserError("the same model is given twice")
    return found


def print_scores(scores: dict[str, dict[str, Any]]) -> None:
    """A line for each task and model: metrics with standard errors, then what they rest on."""
    for name, tasks in scores.items():
        put(name)
        for task, row in tasks.items():
            numbers = [
                f"{metric} {value:.4f}"
                + (f" ±{row[f'{metric}_stderr']:.4f}" if f"{metric}_stderr" in row else "")
                for metric, value in row.items()
                if isinstance(value, float) and not metric.endswith("_stderr")
            ]
            basis = (
                f"{row['split']}, {row['count']:,} items"
                if "split" in row
                else f"{row['tasks']} tasks, {row['count']:,} items"
            )
            if "length" in row:
                basis = f"{row['split']}, {row['count']:,} windows of {row['length']}"
                basis += f", stride {row['stride']}" if "stride" in row else ""
            mark = (f", lm-eval {row['harness']}" if "harness" in row else "") + (
                "; data altered" if "altered" in row else ""
            )
            if checked := row.get("checked"):
                mark += f"; {checked['again']:,} items again in fp32, no choice is bf16's own"
            put(f"  {task:14} {', '.join(numbers)}  ({basis}; {row['protocol']}{mark})")


def print_comparison(rows: list[Row], samples: dict[str, list[Sample]]) -> None:
    """The table of these rows, and the first two models item by item."""
    from mobilellm.report.score_table import markdown
    from mobilellm.tasks.campaign import compare

    put("\n" + markdown(rows))
    if len(samples) > 1:
        (first, a), (second, b) = list(samples.items())[:2]
        put(f"{first} against {second}, the same items, McNemar's exact test:")
        for task, found in compare(a, b).items():
            for metric, pair in found.items():
                put(
                    f"  {task:14} {metric:8} {100 * pair.difference:+6.2f} "
                    f"±{100 * pair.stderr:.2f} points, p = "
                    f"{pair.p_value:.3g} ({pair.first_only} and {pair.second_only} of "
                    f"{pair.items} items)"
                )


def print_differences(samples: dict[str, list[Sample]], most: int) -> None:
    """Items where the first two models differ."""
    from mobilellm.tasks.campaign import differing, explain

    (first, a), (second, b) = list(samples.items())[:2]
    for pair in differing(a, b, most):
        put("\n" + explain((first, second), pair))
