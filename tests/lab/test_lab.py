"""A lab from its file to its table: planning, killing and going on, several workers, bad input."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import outcome, refused
from tests.lab.labs import LAB

from mobilellm.errors import UserError
from mobilellm.intervals import paired
from mobilellm.lab.folder import LabFolder, is_stale
from mobilellm.lab.lab_file import read_lab
from mobilellm.lab.plan import LabPlan, make_plan
from mobilellm.lab.results import table_of
from mobilellm.lab.session import begin, go_on, write_outputs
from mobilellm.lab.work import Listener, work
from mobilellm.recipe.recipe import Recipe
from mobilellm.terminal.amounts import seconds_of
from mobilellm.train.loop import Outcome
from mobilellm.train.rows import Watcher
from mobilellm.train.start import train

SEEDS = 2
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> LabPlan:
    """The plan of the whole lab, its cells measured."""
    path = tmp_path_factory.mktemp("planned") / "depth.toml"
    path.write_text(LAB)
    return make_plan(read_lab(str(path)), small_data, SEEDS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, planned: LabPlan) -> Path:
    """The folder of the whole lab, trained in one go; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "depth.toml").write_text(LAB)
    lab = read_lab(str(folder / "depth.toml"))
    made = begin(folder / "lab", planned)
    assert work(made).finished == 6
    write_outputs(made, lab)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "lab", tmp_path / "lab")
    shutil.copy(finished / "depth.toml", tmp_path / "depth.toml")
    return tmp_path


def table(folder: Path) -> dict[str, Any]:
    lab = read_lab(str(folder / "depth.toml"))
    return json.loads(json.dumps(table_of(LabFolder.open(folder / "lab", lab), lab)))


def scores(found: dict[str, Any]) -> list[Any]:
    """What of a table does not depend on the clock."""
    return [(row["name"], row["facts"], row["metrics"]) for row in found["rows"]]


def test_cells_are_ordinary_runs_of_equal_size_with_the_same_seeds(finished: Path) -> None:
    found = table(finished)
    sizes = [row["facts"]["parameters"] for row in found["rows"]]
    assert [row["facts"]["layers"] for row in found["rows"]] == [2, 3, 6]
    assert max(sizes) / sizes[1] < 1.02
    assert min(sizes) / sizes[1] > 0.98
    runs = sorted((finished / "lab/runs").iterdir())
    assert len(runs) == 6
    for run in runs:
        for name in ("recipe.toml", "metrics.jsonl", "result.json", "report.html", "checkpoints"):
            assert (run / name).exists(), name
        assert f"seed = {run.name[-1]}\n" in (run / "recipe.toml").read_text()
    fingerprints = {(json.loads((run / "environment.json").read_text())["data_fingerprint"])
                    for run in runs}  # fmt: skip
    assert len(fingerprints) == 1


def test_differences_are_paired_by_seed(finished: Path) -> None:
    found = table(finished)
    values: dict[str, list[float]] = {}
    for row in found["rows"]:
        for seed in range(SEEDS):
            (run,) = (finished / "lab/runs").glob(f"*-{row['name']}-seed{seed}")
            result = json.loads((run / "result.json").read_text())
            values.setdefault(row["name"], []).append(result["held_out"]["bits_per_byte"])
    for row in found["rows"]:
        metric = row["metrics"]["held_out.bits_per_byte"]
        assert list(metric["values"].values()) == values[row["name"]]
        if row["name"] == "3":
            assert metric["difference"] is None
            continue
        wanted = paired(values["3"], values[row["name"]])
        difference = metric["difference"]
        assert (difference["mean"], difference["low"]) == (wanted.mean, wanted.low)
        assert difference["in_noise"] == (difference["low"] <= 0 <= difference["high"])
    assert found["published"]["cells"] == 3
    assert found["noise"]["smallest_difference"] > 0


class KillAt(Listener):
    """Kills this process at a step of the run with a number."""

    def __init__(self, run: int, step: int) -> None:
        self.run, self.step, self.count = run, step, 0

    def began(self, job: Any, progress: Any) -> Watcher:
        self.count += 1
        listener = self

        class Steps(Watcher):
            def stepped(self, row: Any) -> None:
                if listener.count == listener.run and row["step"] == listener.step:
                    os.kill(os.getpid(), signal.SIGKILL)

        return Steps()


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.lab.test_lab import KillAt
from mobilellm.lab.folder import LabFolder
from mobilellm.lab.work import work
work(LabFolder.open(Path(sys.argv[1])), listener=KillAt(2, int(sys.argv[2])))
"""


def test_a_lab_that_is_killed_goes_on_to_the_same_table_to_the_bit(
    finished: Path, planned: LabPlan, tmp_path: Path
) -> None:
    shutil.copy(finished / "depth.toml", tmp_path / "depth.toml")
    lab = read_lab(str(tmp_path / "depth.toml"))
    folder = begin(tmp_path / "lab", planned)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "lab"), "8", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "lab/done").iterdir())) == 1
    assert len(list((tmp_path / "lab/claims").iterdir())) == 1  # of the dead process
    assert work(go_on(tmp_path / "lab", lab, None, None)).finished == 5
    assert not list((tmp_path / "lab/claims").iterdir())
    assert scores(table(tmp_path)) == scores(table(finished))
    assert folder.path == tmp_path / "lab"


WORKER = """
import sys
from pathlib import Path
from mobilellm.lab.folder import LabFolder
from mobilellm.lab.work import work
print(work(LabFolder.open(Path(sys.argv[1]))).finished)
"""


def test_two_workers_share_a_folder_and_train_nothing_twice(
    finished: Path, planned: LabPlan, tmp_path: Path
) -> None:
    shutil.copy(finished / "depth.toml", tmp_path / "depth.toml")
    begin(tmp_path / "lab", planned)
    command = [sys.executable, "-c", WORKER, str(tmp_path / "lab")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [int(process.communicate(timeout=120)[0]) for process in both]
    assert sum(counts) == 6
    assert min(counts) > 0
    assert scores(table(tmp_path)) == scores(table(finished))


def test_claims_are_taken_once_and_stale_ones_taken_over(copy: Path) -> None:
    folder = LabFolder.open(copy / "lab")
    first, second, *_ = folder.jobs()
    for job in (first, second):
        folder.record("done", job).unlink()
    with folder.claim() as one, folder.claim() as two:
        assert one == first
        assert two == second
        with folder.claim() as none:
            assert none is None
    path = folder.record("claims", first)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for holder, age, stale in [
        ({"host": socket.gethostname(), "pid": os.getpid()}, 1e6, False),
        ({"host": socket.gethostname(), "pid": gone.pid}, 0, True),
        ({"host": "elsewhere", "pid": 1}, 0, False),
        ({"host": "elsewhere", "pid": 1}, 1e6, True),
        ("cut off", 0, False),
        ("cut off", 1e6, True),
    ]:
        path.write_text(json.dumps(holder) if isinstance(holder, dict) else '{"host": ')
        os.utime(path, (time.time() - age,) * 2)
        assert is_stale(path) is stale, (holder, age)
        with folder.claim() as got:
            assert got == (first if stale else second)


def test_more_seeds_are_added_to_what_is_there(copy: Path) -> None:
    lab = read_lab(str(copy / "depth.toml"))
    folder = go_on(copy / "lab", lab, 3, None)
    assert [job.seed for job in folder.left()] == [2, 2, 2]
    with pytest.raises(UserError, match="began with 3 seeds, not 1"):
        go_on(copy / "lab", lab, 1, None)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (UserError("step 7: 5 steps skipped in a row"), "step 7: 5 steps skipped in a row"),
        (ZeroDivisionError("division by zero\nmore"), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failed_run_is_listed_and_does_not_stop_the_others(
    copy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    lab = read_lab(str(copy / "depth.toml"))
    folder = LabFolder.open(copy / "lab", lab)
    for job in folder.jobs()[-2:]:
        folder.record("done", job).unlink()
        shutil.rmtree(folder.run(job))

    def failing(run: Path, recipe: Recipe, watcher: Watcher) -> Outcome:
        if recipe.model.override["num_hidden_layers"] == 2:
            raise error
        return train(run, recipe, watcher)

    monkeypatch.setattr("mobilellm.lab.work.train", failing)
    worked = work(folder)
    assert (worked.finished, worked.failed) == (1, ["01-2-seed1"])
    found = table_of(folder, lab)
    assert found["failed"] == [{"cell": "2", "seed": 1, "why": why}]
    assert (found["done"], found["runs"]) == (5, 6)
    assert not folder.left()
    monkeypatch.undo()
    folder.forget_failures()
    assert work(folder).finished == 1
    assert not table_of(folder, lab)["failed"]


def test_a_budget_decides_steps_and_ends_the_work(
    tmp_path: Path, lab_file: Path, small_data: Path, steady: None
) -> None:
    lab_file.write_text(lab_file.read_text().replace("steps = 12\n", ""))
    lab = read_lab(str(lab_file))
    small, large = (make_plan(lab, small_data, 1, budget) for budget in (15.0, 60.0))
    steps = [plan.planned[0].cell.recipe.train.steps for plan in (small, large)]
    assert steps[0] < steps[1]
    assert small.seconds <= 15
    # Where the text is scored at the end alone, seven evaluations less leave time for more steps.
    once = make_plan(read_lab(str(lab_file), {"train.evaluate_every": 0}), small_data, 1, 15.0)
    assert steps[0] < once.planned[0].cell.recipe.train.steps < steps[1]
    assert once.seconds <= 15
    assert len({each.cell.recipe.train.steps for each in small.planned}) == 1
    folder = begin(tmp_path / "lab", small)
    worked = work(folder, budget=0.0)
    assert worked.out_of_budget
    assert worked.finished == 0
    assert len(folder.left()) == 3


@pytest.mark.parametrize("doublings", [0, 2])
@pytest.mark.parametrize("equal", ["flops", "time"])
def test_steps_hold_flops_or_time_equal(
    lab_file: Path, small_data: Path, steady: None, equal: str, doublings: int
) -> None:
    text = (
        lab_file.read_text()
        .replace('"parameters"', f'"{equal}"')
        .replace("steps = 12", "steps = 300", 1)
    )
    text = text.replace("[2, 3, 6]", "[2, 3, 12]")
    ramp = f"batch_doublings = {doublings}\nbatch_doubling_steps = 20\n"
    text = text[: text.index("[published]")].replace("steps = 300\n", f"steps = 300\n{ramp}")
    lab_file.write_text(text)
    plan = make_plan(read_lab(str(lab_file)), small_data, 1)
    steps = [each.cell.recipe.train.steps for each in plan.planned]
    assert steps[0] > steps[1] == 300 > steps[2]
    if equal == "flops":
        costs = [float(each.cell.facts()["flops"]) for each in plan.planned]
    else:  # a quarter of the tokens takes a quarter of the time, and the optimizer all of its own
        costs = [
            sum(
                (each.time.step - 0.002) * each.cell.recipe.batch_tokens(i) / 128 + 0.002
                for i in range(own)
            )
            for each, own in zip(plan.planned, steps, strict=True)
        ]
    assert costs == pytest.approx([costs[1]] * 3, rel=0.02)
    spent = sum(
        each.cell.recipe.batch_tokens(i)
        for each, own in zip(plan.planned, steps, strict=True)
        for i in range(own)
    )
    assert plan.tokens == spent


def test_budgets_are_read() -> None:
    assert [seconds_of(text) for text in ("6h", "90 min", "1.5h", "45m", "300s", "1d")] == [
        21600, 5400, 5400, 2700, 300, 86400,
    ]  # fmt: skip
    for text in ("", "6", "h", "-1h", "0h", "6 weeks"):
        with pytest.raises(UserError, match="no time"):
            seconds_of(text)


# --- bad input: one line, exit status 2, nothing lost ---


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("num_hidden_layers = [2", "num_hiden_layers = [2", "did you mean 'num_hidden_layers'?"),
        ("[axes]", '[axes]\n"optimizer.lerning_rate" = [1.0]', "did you mean 'optimizer.learn"),
        ("[axes]\nnum_hidden_layers", "[axes]\nhidden_size", "cannot vary and hold parameters"),
        ("[shape]", "[shapes]", "unknown key 'shapes'; did you mean 'shape'?"),
        ("[2, 3, 6]", "[2, 3, 6, 200]", "cell '200': the nearest width"),
        ("[2, 3, 6]", "[]", "axes.num_hidden_layers has no values"),
        ("[2, 3, 6]", "[2, 3, 3]", "two cells are called '3'"),
        ('compare = "3"', 'compare = "4"', "unknown cell '4'"),
        ('equal = "parameters"', 'equal = "weight"', "unknown equal = 'weight'"),
        ('column = "accuracy"\n', "", "published.column is missing"),
        ('equal = "parameters"', 'equal = "latency"', "needs a device profile"),
        ("title =", "titel =", "no title"),
        ("title =", "title =", ""),
        ("[axes]", '[axes]\n"train.seed" = [1, 2]', "give --seeds"),
        ("6 = 42.0", "7 = 42.0", "unknown cell '7'"),
        ("head_dim = 8", "head_dim = 0", "shape.head_dim = 0: must be at least 2"),
        ("[shape]\nhead_dim = 8\nffn_multiple = 4\nffn = \"fit\"", "", "there is no [shape]"),
    ],
)  # fmt: skip
def test_a_lab_that_cannot_work_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    lab_file: Path,
    small_data: Path,
    old: str,
    new: str,
    words: str,
) -> None:
    changed(lab_file, old, new)
    out = tmp_path / "lab"
    arguments = ["lab", str(lab_file), "--data", str(small_data), "--out", str(out)]
    if words:
        assert words in refused(capsys, *arguments)
    else:
        assert "seeds 0: must be from 1" in refused(capsys, *arguments, "--seeds", "0")
    assert not out.exists()


@pytest.mark.usefixtures("steady")
def test_a_budget_below_one_cell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, lab_file: Path, small_data: Path
) -> None:
    out = tmp_path / "lab"
    start = ["lab", str(lab_file), "--data", str(small_data), "--out", str(out), "--budget"]
    assert "is below one run of cell" in refused(capsys, *start, "0.001s")
    assert "no time" in refused(capsys, *start, "soon")
    changed(lab_file, "steps = 12\n", "")
    assert "has no room for 20 steps" in refused(capsys, *start, "0.001s")
    assert "neither train.steps nor a budget" in refused(capsys, *start[:-1])
    assert not out.exists()


def test_the_folder_of_another_lab(
    capsys: pytest.CaptureFixture[str], copy: Path, small_data: Path
) -> None:
    arguments = ["lab", str(copy / "depth.toml"), "--out", str(copy / "lab")]
    changed(copy / "depth.toml", "[2, 3, 6]", "[2, 3, 4]")
    changed(copy / "depth.toml", "6 = 42.0", "4 = 42.0")
    assert "holds another lab (other axes)" in refused(capsys, *arguments)
    arguments[-1] = str(copy)
    arguments += ["--data", str(small_data), "--yes"]
    assert "exists and is not a lab" in refused(capsys, *arguments)
    other = ["lab", "table99", "--out", str(copy / "lab")]
    assert "unknown lab 'table99'" in refused(capsys, *other)


@pytest.mark.parametrize("name", ["result.json", "recipe.toml", "metrics.jsonl", ""])
@pytest.mark.parametrize("what", ["deleted", "edited"])
def test_a_finished_run_that_was_deleted_or_edited(
    capsys: pytest.CaptureFixture[str], copy: Path, name: str, what: str
) -> None:
    run = copy / "lab/runs/01-2-seed1"
    if not name:
        shutil.rmtree(run)
        what, name = "deleted", "recipe.toml"
    elif what == "deleted":
        (run / name).unlink()
    else:
        with open(run / name, "a") as file:
            file.write("\n")
    line = refused(capsys, "lab", str(copy / "depth.toml"), "--out", str(copy / "lab"))
    assert f"{run / name}: {what} since the lab finished this run" in line
    assert "to train it again" in line


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("lab.json", '"seeds": 2', '"seeds": "two"'),
        ("lab.json", '"content"', '"contents"'),
        ("lab.json", '"cells"', '"cells'),
        ("done/01-2-seed1.json", '"seconds"', '"second"'),
    ],
)
def test_a_damaged_record_is_one_line(
    capsys: pytest.CaptureFixture[str], copy: Path, name: str, old: str, new: str
) -> None:
    changed(copy / "lab" / name, old, new)
    line = refused(capsys, "lab", str(copy / "depth.toml"), "--out", str(copy / "lab"))
    assert line.startswith(f"mobilellm: {copy / 'lab' / name}")


def test_an_unfinished_run_that_was_edited(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    folder = LabFolder.open(copy / "lab")
    job = folder.jobs()[-1]
    folder.record("done", job).unlink()
    changed(folder.run(job) / "recipe.toml", "batch_tokens = 128", "batch_tokens = 64")
    line = refused(capsys, "lab", str(copy / "depth.toml"), "--out", str(copy / "lab"))
    assert "edited since the lab began this run (train.batch_tokens)" in line


def test_the_verb_prints_a_table_and_goes_on(
    capsys: pytest.CaptureFixture[str], copy: Path
) -> None:
    folder = LabFolder.open(copy / "lab")
    folder.record("done", folder.jobs()[-1]).unlink()
    arguments = ["lab", str(copy / "depth.toml"), "--out", str(copy / "lab")]
    status, out, err = outcome(capsys, *arguments)
    assert status == 0, err
    assert "6/6  6, seed 1: training" in err
    rows = [line.split() for line in out.splitlines() if line[:2] in ("2 ", "3 ", "6 ")]
    assert [row[0] for row in rows] == ["2", "3", "6"]
    assert "rank correlation with a paper <b> over 3 cells" in out
    status, out, _ = outcome(capsys, *arguments, "--json")
    found = json.loads(out)
    assert (found["done"], found["runs"]) == (6, 6)
    assert json.loads((copy / "lab/table.json").read_text()) == found


def test_the_plan_is_printed_and_nothing_begun(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, lab_file: Path, small_data: Path
) -> None:
    out = tmp_path / "lab"
    arguments = ["lab", str(lab_file), "--data", str(small_data), "--out", str(out), "--plan"]
    status, text, _ = outcome(capsys, *arguments, "--set", "train.steps=30", "--seeds", "2")
    assert status == 0
    assert "3 cells x 2 seeds, equal parameters" in text
    assert "6 runs, 23k tokens" in text
    assert "from 8.98 times the standard deviation" in text
    assert not out.exists()
