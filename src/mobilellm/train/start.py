"""How a run begins: new, from given weights, as a branch of another run, or where it stopped.

    # A new run; recipe.start.from_ names weights to go on from.
    outcome = train(Path("runs/mine"), recipe)
    # Ends with the bits of a run that was not stopped.
    outcome = resume(Path("runs/mine"))
    outcome = branch(Path("runs/short"), Path("runs/mine"), decay_steps=100)

All take the `World` of processes to train in; by default it is this process alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path

from mobilellm.damage import reading
from mobilellm.data.dataset import Data
from mobilellm.distributed.world import World
from mobilellm.errors import UserError
from mobilellm.hardware.description import describe
from mobilellm.hardware.probes import pick_device
from mobilellm.model.config import ModelConfig
from mobilellm.optimizers import schedule
from mobilellm.recipe.recipe import CutRecipeError, Recipe
from mobilellm.train import checkpoint
from mobilellm.train.inputs import Weights, model_config, open_data
from mobilellm.train.interrupts import StopRequest
from mobilellm.train.loop import Outcome, Trainer
from mobilellm.train.origin import read_origin
from mobilellm.train.resolve import resolve, resolve_products
from mobilellm.train.rows import Watcher
from mobilellm.train.run_folder import (
    Metrics,
    create,
    hold,
    mend_environment,
    now,
    read_recipe,
    set_aside,
)

# What may differ when a run goes on. Nothing of it changes what is computed but in the order of
# sums, save the mixture, which is meant to.
CHANGEABLE = {
    "data": {"stages"},
    "train": {
        "micro_batch_size",
        "evaluate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "async_checkpoints",
        "log_every",
        "threads",
        "profile_steps",
        "max_skipped_in_a_row",
        "attention",
        "compile",
        "products",
    },
    "parallel": {"kind", "shard_group_size", "timeout"},
    "track": {"tensorboard", "trackio", "wandb", "every"},
    "eval": {"tasks", "every", "limit", "data"},
}


def train(
    run: Path, recipe: Recipe, watcher: Watcher | None = None, world: World | None = None
) -> Outcome:
    """Start a new run in the folder `run`, which must be empty or absent, and train it to the
    end."""
    return _begin(run, recipe, watcher or Watcher(), world or _alone(), None)


def branch(
    run: Path,
    source: Path,
    watcher: Watcher | None = None,
    world: World | None = None,
    decay_steps: int = 0,
) -> Outcome:
    """Start a new run from a checkpoint of another one and let its learning rate fall over
    `decay_steps` steps (0: as the recipe has it): what a wsd schedule's stable part is good for.
    `UserError` for a run without one."""
    origin = source.parent.parent if source.parent.name == "checkpoints" else source
    recipe = read_recipe(origin)
    path = source if source != origin else checkpoint.newest_valid(origin)[0]
    if path is None:
        raise UserError(f"{origin}: no checkpoint verifies", hint="name another run")
    checkpoint.verify(path)
    step, section = checkpoint.step_of(path), recipe.optimizer
    if not schedule.may_be_longer(section):
        raise UserError(
            f"{origin}: its schedule is {section.schedule}, whose learning rate falls from the "
            "start",
            hint="branch from a run with optimizer.schedule wsd or constant",
        )
    stable = schedule.decay_start(recipe.train.steps, section)
    if step > stable:
        raise UserError(
            f"{path}: its learning rate falls already (since step {stable})",
            hint=f"name one up to step {stable}",
        )
    decay = decay_steps or schedule.decay_steps(recipe.train.steps, section)
    recipe = recipe.replace("train", steps=step + decay)
    recipe = recipe.replace("optimizer", schedule="wsd", decay_steps=decay)
    return _begin(run, recipe, watcher or Watcher(), world or _alone(), path)


def resume(
    run: Path,
    watcher: Watcher | None = None,
    world: World | None = None,
    changes: Recipe | None = None,
    allow_data_change: bool = False,
) -> Outcome:
    """Go on with a run from its newest checkpoint that verifies, or from its start when it has
    none.

    The run's own recipe holds; `changes` may differ from it in what CHANGEABLE lists, and in more
    train.steps where the schedule has a part that does not depend on them. `UserError` when the
    data or the tokenizer changed since; with `allow_data_change` the new data are read from their
    beginning.
    """
    world, watcher = world or _alone(), watcher or Watcher()
    own, lost = _own_recipe(run)
    recipe = own if changes is None else merged(own, changes, run)
    recipe.check()
    with hold(run) if world.main else contextlib.nullcontext(), StopRequest() as stop:
        path = world.broadcast(_newest(run, own, recipe, watcher) if world.main else None)
        data = open_data(recipe, world)
        weights = _weights(recipe, data, path)
        trainer = Trainer(recipe, data, watcher, world, weights)
        if path is not None:
            with reading(path, "a checkpoint"):
                trainer.restore(path, allow_data_change)
        if world.main:
            environment = describe(trainer.device) | {"data_fingerprint": data.fingerprint}
            mended = [Metrics(run).rewind(trainer.state.step), mend_environment(run, environment)]
            for line in filter(None, mended):
                watcher.said(line)
            if lost:
                set_aside(run / "recipe.toml")
                watcher.said(lost)
            if recipe != own or lost:
                recipe.write(run / "recipe.toml")
        world.barrier("the beginning of the run")
        return trainer.fit(run, stop)


def _own_recipe(run: Path) -> tuple[Recipe, str]:
    """The run's own recipe. Where its file was cut, that of the newest checkpoint that verifies,
    and a line that says so."""
    try:
        return read_recipe(run), ""
    except CutRecipeError as error:
        newest, _ = checkpoint.newest_valid(run)
        if newest is None or not (newest / checkpoint.RECIPE_FILE).is_file():
            raise
        return Recipe.read(newest / checkpoint.RECIPE_FILE), f"{error}; as {newest.name} has it"


def merged(own: Recipe, changes: Recipe, run: Path) -> Recipe:
    """The run's own recipe with what may change taken from `changes`. `UserError` names what else
    differs."""
    mine, given = own.to_dict(), changes.to_dict()
    path = given["data"]["path"]
    given["data"]["path"] = str(Path(path).resolve()) if path else mine["data"]["path"]
    differing, too_long = [], False
    for section, values in given.items():
        for key in values.keys() | mine[section].keys():
            new, old = values.get(key), mine[section].get(key)
            if new == old or new == "auto":  # "auto" was resolved when the run began
                continue
            longer = (section, key) == ("train", "steps") and new > old  # type: ignore[operator]
            if key in CHANGEABLE.get(section, ()) or (
                longer and schedule.may_be_longer(own.optimizer)
            ):
                mine[section][key] = new
            else:
                too_long = too_long or longer
                differing.append(f"{section}.{key} is {old!r} there, {new!r} here")
    if differing:
        fallen = f"the learning rate of its {own.optimizer.schedule} schedule falls by its length"
        raise UserError(
            f"{run}: another recipe began this run ({'; '.join(sorted(differing))})"
            + (f", and {fallen}" if too_long else ""),
            hint="only runs with optimizer.schedule wsd or constant can be made longer"
            if too_long
            else "resume it with its own recipe, or choose another --out",
        )
    return Recipe.from_dict(mine)


def _alone() -> World:
    return World(device=pick_device())


def _begin(
    run: Path, recipe: Recipe, watcher: Watcher, world: World, source: Path | None
) -> Outcome:
    """Make a new run's folder and train it; `source` is a checkpoint of the run that it branches
    from."""
    recipe.check()
    data = open_data(recipe, world)
    recipe = recipe.replace("data", path=str(Path(recipe.data.path).resolve()))
    if recipe.start.from_:
        recipe = recipe.replace("start", from_=str(Path(recipe.start.from_).resolve()))
    if recipe.distill.cache:
        recipe = recipe.replace("distill", cache=str(Path(recipe.distill.cache).resolve()))
    resolved = resolve(recipe, world.device).to_dict() if world.main else None
    recipe = Recipe.from_dict(world.broadcast(resolved))
    # A branch has the weights of its checkpoint: the model that its run once started from need not
    # be there any more.
    given = recipe.start.from_ and source is None
    origin = read_origin(Path(recipe.start.from_), data) if given else None
    weights = origin.weights if origin is not None else _weights(recipe, data, source)
    config = model_config(recipe, data, weights.config if weights else None)
    products = resolve_products(recipe, config, world.device, world.size) if world.main else ""
    recipe = recipe.replace("train", products=world.broadcast(products))
    trainer = Trainer(recipe, data, watcher, world, weights)
    trainer.loader()  # complains about data too short for one batch before anything is written
    environment = describe(trainer.device) | {
        "precision": recipe.train.precision,
        "compile": recipe.train.compile,
        "attention": recipe.train.attention,
        "products": recipe.train.products,
        "processes": world.size,
        "data_fingerprint": data.fingerprint,
        "started": now(),
    }
    if world.main and weights is not None:
        applied = [_applied(each) for each in (weights.config, config)]
        if applied[0] != applied[1]:
            watcher.said(f"{recipe.start.from_}: {applied[0]}; from here on {applied[1]}")
    if source is not None:
        trainer.restore(source, allow_data_change=False)
        environment["branched_from"] = str(source.resolve())
    elif origin is not None:
        score = trainer.evaluation.held_out()
        environment["started_from"] = origin.facts | {"held_out": dataclasses.asdict(score)}
        if world.main:
            watcher.said(
                f"step 0, from {recipe.start.from_}: held-out loss {score.loss:.4f} "
                f"({score.bits_per_byte:.4f} bits a byte)"
            )
    if world.main:
        create(run, recipe, environment)
    with hold(run) if world.main else contextlib.nullcontext(), StopRequest() as stop:
        world.barrier("the beginning of the run")
        return trainer.fit(run, stop)


def _applied(config: ModelConfig) -> str:
    """How a network's blocks are applied."""
    if config.layer_repeats == 1:
        return "each block is applied once"
    return (
        f"each block is applied {config.layer_repeats} times ({config.layer_order}, keys and "
        f"values of {'each' if config.shared_kv == 'own' else 'the first'})"
    )


def _weights(recipe: Recipe, data: Data, path: Path | None) -> Weights | None:
    """What a run that started from given weights is built with: once it has a checkpoint, that
    one's shape is enough."""
    if not recipe.start.from_:
        return None
    if path is None:
        return read_origin(Path(recipe.start.from_), data).weights
    return Weights(config=ModelConfig.read(path / "config.json"), named=None)


def _newest(run: Path, own: Recipe, recipe: Recipe, watcher: Watcher) -> Path | None:
    """The checkpoint to go on from; those after it are set aside under a name that says why.

    A run that is made longer goes on from before its learning rate fell. `UserError` when there are
    checkpoints, but none that can be gone on from.
    """
    path, rejected = checkpoint.newest_valid(run)
    for line in rejected:
        watcher.said(f"rejected: {line}")
    if rejected and path is None:
        raise UserError(f"{run}: no checkpoint verifies: {rejected[0]}", hint="start a new run")
    if path is not None:
        _set_aside(run, path, "rejected")
    if path is not None and recipe.train.steps > own.train.steps:
        stable = schedule.decay_start(own.train.steps, own.optimizer)
        usable = [p for p in checkpoint.complete(run) if checkpoint.step_of(p) <= stable]
        if not usable:
            raise UserError(
                f"{run}: its learning rate has fallen since step {stable}, and no checkpoint up to "
                "there is left",
                hint="a longer run keeps some with train.keep_every; start a new run",
            )
        path = usable[-1]
        checkpoint.verify(path)
        _set_aside(run, path, "shorter-run")
        watcher.said(
            f"{own.train.steps} steps become {recipe.train.steps}, from step "
            f"{checkpoint.step_of(path)} on"
        )
    return path


def _set_aside(run: Path, newest: Path, why: str) -> None:
    """Rename the checkpoints after `newest`."""
    for later in checkpoint.complete(run):
        if later.name > newest.name:
            aside = later.with_name(f"{why}-{later.name}")
            shutil.rmtree(aside, ignore_errors=True)  # one of an earlier time
            later.rename(aside)
