"""What `mobilellm quantize` prints: a result in a few lines, a row of the table in one."""

from __future__ import annotations

from mobilellm.workflows.quantize import QuantizeResult, Row

HEAD = f"{'scheme':7} {'method':7} {'embedding':9} {'MB':>8} {'perplexity':>11} over fp32"


def result_lines(result: QuantizeResult) -> list[str]:
    """A quantized model: what it is, its size, and what it cost."""
    before, after = result.before, result.after
    first = (
        f"{result.out}: {result.scheme} by {result.method}, embedding {result.embedding}; "
        f"weights {result.bytes_before / 1e6:,.1f} MB in fp32, "
        f"{result.bytes_after / 1e6:,.1f} MB now"
    )
    lines = [
        first,
        *(f"- {note}" for note in result.notes),
    ]
    if result.calibration is not None:
        lines.append("calibrated on {tokens:,} tokens of {text}".format(**result.calibration))
    if before is not None and after is not None:
        lines.append(
            f"perplexity {before.perplexity:.3f} before, {after.perplexity:.3f} after "
            f"({after.perplexity / before.perplexity:.3f}x, {after.tokens:,} tokens)"
        )
    return lines


def row_line(row: Row) -> str:
    """A row under HEAD, with its tasks behind it."""
    tasks = "".join(f"  {name} {value:.1%}" for name, value in row.tasks.items())
    return (
        f"{row.scheme:7} {row.method or '-':7} {row.embedding:9} {row.bytes / 1e6:8,.1f} "
        f"{row.perplexity:11,.3f} {row.ratio:8.4f}x{tasks}"
    )
