"""What `mobilellm plan` prints: the figures of a run before it is paid, a line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mobilellm.report.figures import count
from mobilellm.terminal.output import duration, put, size

if TYPE_CHECKING:
    from mobilellm.lab.latency import Forecast
    from mobilellm.plan.run import Plan as PlanFigures


def print_plan(plan: PlanFigures, on_device: Sequence[Forecast] = ()) -> None:
    """Print the plan as lines, and what the model will take on a device where that is forecast."""
    flops, memory = plan["flops_per_token"], plan["memory_bytes"]
    what = f"{plan['devices']} x {plan['device']}" if plan["devices"] > 1 else plan["device"]
    verdict = "fits" if plan["fits"] else "DOES NOT FIT: lower --micro-batch-size or add --fsdp"
    parts = ", ".join(f"{name} {size(number)}" for name, number in memory.items() if name != "peak")
    days = plan["days"]
    lines = [
        (
            f"{count(plan['parameters'])} parameters on {count(plan['tokens'])} tokens "
            f"({plan['tokens_per_parameter']:,.0f} a parameter), {what}, {plan['precision']}"
        ),
        (
            f"FLOPs        {flops['six_n']:.3g} a token (6N), {flops['palm']:.3g} with attention "
            f"(PaLM's count); {plan['flops']:.3g} in all"
        ),
        (
            f"efficiency   {plan['mfu_palm']:.1%} MFU (PaLM's count), {plan['mfu_6n']:.1%} (6N): "
            f"{plan['mfu_from']}"
        ),
        (
            f"speed        {plan['tokens_per_second_per_device']:,.0f} tokens/s a device, "
            f"{plan['tokens_per_second']:,.0f} in all"
        ),
        (
            f"steps        {plan['steps']:,} of {plan['batch_tokens']:,} tokens, "
            f"{duration(plan['step_seconds'])} each"
        ),
        (
            f"memory       {size(memory['peak'])} of {size(plan['device_facts']['memory'])} a "
            f"device with a micro-batch of {plan['micro_batch_size']}: {verdict}"
        ),
        f"             {parts}",
        (
            f"time         {f'{days:.1f} days' if days >= 1 else duration(days * 86400)}, "
            f"{plan['gpu_hours']:,.1f} device hours"
        ),
    ]
    if plan["energy_kwh"] is not None:
        lines.append(f"energy       {plan['energy_kwh']:,.0f} kWh at the devices' full power")
    if plan["cost"] is not None:
        lines.append(f"cost         {plan['cost']:,.0f}")
    lines += [
        f"on a device  {one['milliseconds']:.2f} ms a token, a file of {one['megabytes']:,.1f} MB, "
        f"by {one['runtime']} on {one['device']}; {one['error']:.0%} off on shapes like these"
        for one in on_device
    ]
    put("\n".join([*lines, f"figures of   {plan['device_facts']['source']}"]))
