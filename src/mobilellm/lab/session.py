"""A lab from its file to its table: what `mobilellm lab` does, without a terminal.

lab = read_lab("table11")
folder = begin(Path("labs/depth"), make_plan(lab, Path("data/book"), seeds=3, budget=3600))
work(folder)
table = write_outputs(folder, lab)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mobilellm.errors import UserError
from mobilellm.files import write_json
from mobilellm.lab.folder import Job, LabFolder
from mobilellm.lab.lab_file import LabFile
from mobilellm.lab.latency import LatencyModel
from mobilellm.lab.plan import LabPlan
from mobilellm.lab.results import LabTable, table_of
from mobilellm.lab.shapes import Measure, parameters_of
from mobilellm.profiling.device_profile import DeviceProfile, read_profile
from mobilellm.report.lab_page import Curve, write_lab_page
from mobilellm.report.run_files import points, read_metrics
from mobilellm.train.inputs import open_data


def measure_of(lab: LabFile, runtime: str = "") -> tuple[Measure, str]:
    """What the lab's shapes hold equal: parameters, or milliseconds a token by the lab's device
    profile; and that device."""
    if lab.equal != "latency":
        return parameters_of, ""
    if not lab.profile:
        raise UserError(
            'equal = "latency" needs a device profile',
            hint="add --profile PROFILE.json, made by `mobilellm profile`",
        )
    model = LatencyModel.fit(read_profile(Path(lab.profile)), runtime, lab.profile)
    return model.milliseconds, model.device


def begin(path: Path, plan: LabPlan) -> LabFolder:
    """Begin a planned lab in a folder that is empty or absent."""
    return LabFolder.create(path, plan)


def go_on(path: Path, lab: LabFile, seeds: int | None, data: Path | None) -> LabFolder:
    """Go on with a lab. `UserError` for a folder of another lab, for finished runs that were
    deleted or edited, and for data that are not those it began with."""
    folder = LabFolder.open(path, lab, seeds)
    if lab.profile:
        check_device(folder, read_profile(Path(lab.profile)), lab.profile)
    recipe = next(iter(folder.recipes.values()))
    began = Path(recipe.data.path)
    if data is not None and data.resolve() != began:
        raise UserError(
            f"{path}: began with the data {began}, not {data}",
            hint="leave --data out, or choose another --out",
        )
    if folder.left() and open_data(recipe).fingerprint != folder.plan["data_fingerprint"]:
        raise UserError(
            f"{began}: the data changed since the lab began",
            hint="restore them, or choose another --out",
        )
    return folder


def check_device(folder: LabFolder, profile: DeviceProfile, where: str) -> None:
    """`UserError` for the profile of another device than that by which the lab's shapes were
    solved."""
    found, began = str(profile["machine"].get("device")), folder.plan["profile_device"]
    if found != began:
        raise UserError(
            f"{where}: of {found}; {folder.path} was solved for {began}",
            hint="choose another --out for another device",
        )


def write_outputs(folder: LabFolder, lab: LabFile) -> LabTable:
    """table.json and report.html of what is finished; returns the table."""
    table = table_of(folder, lab)
    write_json(folder.path / "table.json", table)
    write_lab_page(folder.path / "report.html", table, curves(folder))
    return table


def curves(folder: LabFolder) -> dict[str, list[Curve]]:
    """Cell -> for each finished run, held-out bits a byte over tokens."""
    found: dict[str, list[Curve]] = {cell["name"]: [] for cell in folder.plan["cells"]}
    for job in folder.jobs():
        if folder.is_done(job):
            found[job.cell].append(_curve(folder, job))
    return found


def _curve(folder: LabFolder, job: Job) -> Curve:
    rows, _ = read_metrics(folder.run(job) / "metrics.jsonl")
    return points(rows, "held_out_bits_per_byte", over="tokens")


def with_profile(lab: LabFile, profile: Path | None) -> LabFile:
    """The lab with another device profile than its file names."""
    if profile is not None and lab.equal != "latency":
        raise UserError('--profile is for a lab with equal = "latency"', hint="leave it out")
    return lab if profile is None else dataclasses.replace(lab, profile=str(profile))
