"""What fine-tuning costs and gives: a step's speed, packing, TRL's trainer beside ours, a teacher.

    python benchmarks/post_training.py --model MODEL --talks chitchat.jsonl.gz --work FOLDER \\
        --only sft trl --save benchmarks/results/post_training.json
    python benchmarks/post_training.py --smoke

- sft: steps on packed conversations and steps on plain text of as many tokens, in turns.
- trl: TRL's SFTTrainer (pip install trl) on the same model, conversations, masks and optimizer,
  whose losses are compared step by step; useful tokens are those that are trained on, and time is
  the process's own, so that other work on the machine counts for nothing.
- kd: a student with a teacher's cache and without, with equal tokens and with equal FLOPs, three
  seeds.
- online: what asking the teacher in each step costs, over what its FLOPs say.

Sets of weights after training for a grid of integers are in benchmarks/qat.py.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mobilellm.conversations.prepare_chat import prepare_chat
from mobilellm.data.loader import DataState, Loader
from mobilellm.data.token_folder import TokenFolder
from mobilellm.distributed.world import World
from mobilellm.evaluate.conversations import packed
from mobilellm.hardware.description import describe
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.interop.loaded import Loaded
from mobilellm.intervals import paired
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.model.loss import IGNORED, NextToken
from mobilellm.model.network import Network
from mobilellm.objectives.distillation import Distillation
from mobilellm.recipe.recipe import Recipe
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.train.origin import read_origin
from mobilellm.train.start import train
from mobilellm.train.step import TrainStep
from mobilellm.weights.assemble import assemble
from mobilellm.workflows.distill import distill

LEARNING_RATE = 1e-4
Arrays = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]


def prepared(arguments: argparse.Namespace, tokenizer: Tokenizer, count: int) -> TokenFolder:
    """The first conversations as a token folder, each of them whole within the length."""
    out: Path = arguments.work / f"talks-{count}"
    if not out.exists():
        opener = gzip.open if arguments.talks.suffix == ".gz" else open
        with opener(arguments.talks, "rb") as file:
            lines = [line for line, _ in zip(file, range(count), strict=False)]
        rows = [json.loads(line) for line in lines]
        for row in rows:  # a conversation begins with the user and ends with the assistant
            turns = row["turns"][1:] if row["turns"][0]["role"] == "assistant" else row["turns"]
            row["turns"] = turns[: len(turns) // 2 * 2][:6]
        source = arguments.work / f"talks-{count}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows if row["turns"]))
        prepare_chat(
            [source],
            out,
            tokenizer=tokenizer,
            context=arguments.length,
            held_out=0.1,
            on_bad="skip",
        )
    return TokenFolder.open(out)


def started(arguments: argparse.Namespace) -> tuple[Loaded, TokenFolder]:
    """The model with rows for the special tokens of the template, as a folder, and the data."""
    tokenizer = load(arguments.model).require_tokenizer()
    data = prepared(arguments, tokenizer, arguments.conversations)
    folder: Path = arguments.work / "start"
    if not folder.exists():
        weights = read_origin(arguments.model, data).weights
        assert weights.named is not None
        folder.mkdir()
        network = assemble(weights.config, weights.named, str(folder))
        save_checkpoint(folder, network, data.tokenizer(), {})
    return load(folder), data


def recipe(arguments: argparse.Namespace, rows: int) -> Recipe:
    """Settings that every contestant follows; a step is so many rows."""
    return Recipe.from_dict(
        {
            "data": {"sequence_length": arguments.length, "mask_documents": True},
            "train": {
                "batch_tokens": rows * arguments.length,
                "micro_batch_size": rows,
                "precision": "fp32",
                "compile": "off",
            },
            "optimizer": {
                "learning_rate": LEARNING_RATE,
                "betas": [0.9, 0.999],
                "weight_decay": 0.0,
                "warmup_steps": 0,
                "schedule": "constant",
                "max_grad_norm": 1.0,
            },
        }
    )


def step_of(model: Network, arguments: argparse.Namespace, rows: int, masked: bool) -> TrainStep:
    """The training step of a run of ours."""
    world = World(device=torch.device("cpu"))
    return TrainStep(model, recipe(arguments, rows), world, masked, objective=NextToken())


def tensors(arrays: Arrays) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch for the step."""
    inputs, targets, documents = (torch.from_numpy(array) for array in arrays)
    return inputs, targets, documents


def sft(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step on conversations and of one on text, in turns."""
    model, data = started(arguments)
    rows = 4
    batches = [
        b for b in packed(data.tokens("train"), arguments.length, rows, 1) if len(b[0]) == rows
    ][: arguments.repeats]
    step = step_of(model.network, arguments, rows, masked=True)
    seconds: dict[str, list[float]] = {"conversations": [], "text": []}
    for number, batch in enumerate(batches):
        inputs, targets, documents = tensors(batch)
        plain = torch.cat((inputs[:, 1:], inputs[:, :1]), dim=1)
        for name, given in (
            ("conversations", (inputs, targets, documents)),
            ("text", (inputs, plain)),
        ):
            begun = time.process_time()
            loss = step.forward_backward(*given)
            step.update(number, loss)
            seconds[name].append(time.process_time() - begun)
    median = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    used = sum(int((b[2] < b[2][:, -1:]).sum()) for b in batches)
    tokens = rows * arguments.length
    stream = data.tokens("train")
    return {
        "tokens_a_step": tokens,
        "tokens_per_cpu_second": {name: tokens / value for name, value in median.items()},
        "speed_over_text": median["text"] / median["conversations"],
        "padding_when_training": 0.0,  # conversations follow each other in one stream
        "padding_when_evaluating": 1 - used / (len(batches) * tokens),
        "trained_share": float(stream.trained(0, len(stream)).mean()),
        "repeats": len(batches) - 1,
    }


def groups(data: TokenFolder, size: int, count: int) -> Iterator[list[tuple[list[int], list[int]]]]:
    """(ids, labels) of so many conversations a step."""
    stream, begin, found = data.tokens("train"), 0, []
    for end in stream.ends().tolist():
        ids = [int(i) for i in stream.read(begin, end - begin)]
        bits = stream.trained(begin, end - begin).tolist()
        begin = end
        found.append((ids, [i if bit else IGNORED for i, bit in zip(ids, bits, strict=True)]))
        if len(found) == size:
            yield found
            found = []
            count -= 1
            if not count:
                return


class Conversations:
    """A group of conversations, as `packed` reads a stream."""

    def __init__(self, group: list[tuple[list[int], list[int]]]) -> None:
        self.ids = np.concatenate([ids for ids, _ in group])
        self.bits = np.concatenate([np.array(labels) != IGNORED for _, labels in group])
        self.limits = np.cumsum([len(ids) for ids, _ in group])

    def ends(self) -> NDArray[np.int64]:
        """Where each ends."""
        return self.limits

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens."""
        return self.ids[start : start + count]

    def trained(self, start: int, count: int) -> NDArray[np.bool_]:
        """Which of them are trained on."""
        return self.bits[start : start + count]


def trl(arguments: argparse.Namespace) -> dict[str, Any]:
    """TRL's SFTTrainer and our step, on the same conversations in the same order."""
    model, data = started(arguments)
    found = list(groups(data, arguments.group, arguments.steps))
    useful = [sum(label != IGNORED for _, labels in g for label in labels) for g in found]
    theirs = _trl(arguments, found)
    losses, seconds, rows = [], [], []
    step = step_of(model.network, arguments, 1, masked=True)
    for number, group in enumerate(found):
        begun = time.process_time()
        (batch,) = packed(Conversations(group), arguments.length, arguments.group, 1)  # type: ignore[arg-type]
        loss = step.forward_backward(*tensors(batch))
        step.update(number, loss)
        losses.append(loss.item())
        seconds.append(time.process_time() - begun)
        rows.append(len(batch[0]))
    apart = [abs(a - b) for a, b in zip(losses, theirs["losses"], strict=True)]
    speed = {
        name: sum(useful[2:]) / sum(taken[2:])
        for name, taken in (("ours", seconds), ("trl", theirs["seconds"]))
    }
    stream_useful, stream_seconds = _as_trained(arguments, data, step, len(found))
    speed["ours, as it trains"] = sum(stream_useful[2:]) / sum(stream_seconds[2:])
    longest = [max(len(ids) for ids, _ in g) * len(g) for g in found]
    real = [sum(len(ids) for ids, _ in g) for g in found]
    return {
        "steps": len(found),
        "conversations_a_step": arguments.group,
        "largest_loss_difference": max(apart),
        "losses": {"ours": losses, "trl": theirs["losses"]},
        "useful_tokens_per_cpu_second": speed,
        "ratio_same_batches": speed["ours"] / speed["trl"],
        "ratio_as_each_trains": speed["ours, as it trains"] / speed["trl"],
        "padding": {
            "ours": 1 - sum(real) / sum(r * arguments.length for r in rows),
            "trl": 1 - sum(real) / sum(longest),
        },
        "trl": theirs["version"],
    }


def _as_trained(
    arguments: argparse.Namespace, data: TokenFolder, step: TrainStep, steps: int
) -> tuple[list[int], list[float]]:
    """Trained tokens and CPU seconds of steps on the stream as a run reads it: one conversation
    after the other, no padding."""
    state = DataState(seed=0, epoch=0, samples=0, fingerprint="")
    loader = Loader(data.tokens("train"), arguments.length, 2, state, mask_documents=True)
    useful, seconds = [], []
    for number, (batch, _) in zip(range(steps), loader, strict=False):
        assert batch.documents is not None
        begun = time.process_time()
        loss = step.forward_backward(*tensors((batch.inputs, batch.targets, batch.documents)))
        step.update(number, loss)
        seconds.append(time.process_time() - begun)
        useful.append(int((batch.targets != IGNORED).sum()))
    return useful, seconds


def _trl(arguments: argparse.Namespace, found: list[Any]) -> dict[str, Any]:
    import datasets
    import transformers
    import trl as library

    folder = arguments.work / "start"
    rows = [{"input_ids": ids, "labels": labels} for group in found for ids, labels in group]
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.process_time() - self.begun)

    class InOrder(library.SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    settings = library.SFTConfig(
        output_dir=str(arguments.work / "trl-run"),
        per_device_train_batch_size=arguments.group,
        max_steps=len(found),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        max_length=arguments.length,
        packing=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(
        model=other,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "seconds": seconds, "version": library.__version__}


def kd(arguments: argparse.Namespace) -> dict[str, Any]:
    """A student with a teacher's cache and without: held-out bits a byte, three seeds."""
    model, data = started(arguments)
    cache = arguments.work / f"cache-{arguments.conversations}"
    begun = time.perf_counter()
    if not cache.exists():
        distill(
            arguments.work / "start", data.path, cache, sequence_length=arguments.length, top_k=32
        )
    asked = time.perf_counter() - begun
    tokens = len(data.tokens("train"))
    size = sum(path.stat().st_size for path in cache.glob("*.npy"))
    teacher, student = (
        sum(p.numel() for p in network.parameters())
        for network in (
            model.network,
            Network(ModelConfig.preset(arguments.student, vocab_size=data.vocab_size)),
        )
    )
    seen = arguments.student_steps * 4 * arguments.length
    flops = 6 * student * seen
    asking = 2 * teacher * tokens
    contestants = {
        "alone": arguments.student_steps,
        "with the teacher": arguments.student_steps,
        "alone, equal FLOPs": round(arguments.student_steps * (1 + asking / flops)),
    }
    scores: dict[str, list[float]] = {name: [] for name in contestants}
    for seed in range(3):
        for name, steps in contestants.items():
            values = recipe(arguments, 4).to_dict()
            values["model"] |= {"preset": arguments.student}
            values["data"] |= {"path": str(data.path), "mask_documents": False}
            values["train"] |= {
                "steps": steps,
                "seed": seed,
                "evaluate_every": 0,
                "checkpoint_every": 10**6,
            }
            values["optimizer"] |= {
                "learning_rate": 2e-3,
                "warmup_steps": max(1, steps // 10),
                "schedule": "cosine",
            }
            if name == "with the teacher":
                values["distill"] |= {"cache": str(cache), "weight": 0.5}
            run = arguments.work / f"student-{name.replace(' ', '-')}-{seed}-{time.time_ns()}"
            outcome = train(run, Recipe.from_dict(values))
            assert outcome.held_out is not None
            scores[name].append(outcome.held_out.bits_per_byte)
    return {
        "held_out_bits_per_byte": scores,
        "gain": gain(scores["alone"], scores["with the teacher"]),
        "gain_at_equal_flops": gain(scores["alone, equal FLOPs"], scores["with the teacher"]),
        "steps": contestants,
        "tokens": seen,
        "flops": {"alone": flops, "with the teacher": flops + asking},
        "cache": {"seconds": asked, "bytes_a_token": size / tokens, "tokens": tokens},
    }


def gain(without: list[float], with_teacher: list[float]) -> dict[str, float | None]:
    """The paired difference's mean and half of its 95 % interval."""
    found = paired(with_teacher, without)
    return {"mean": found.mean, "half_interval_95": found.half}


def online(arguments: argparse.Namespace) -> dict[str, Any]:
    """A student's step with its teacher asked in it, beside its step alone: processor time, over
    what the FLOPs of both say."""
    model, data = started(arguments)
    rows = 4
    config = ModelConfig.preset(arguments.student, vocab_size=data.vocab_size)
    teacher = model.network.eval().requires_grad_(False)
    batches = [
        b for b in packed(data.tokens("train"), arguments.length, rows, 1) if len(b[0]) == rows
    ][: arguments.repeats]
    world = World(device=torch.device("cpu"))
    objectives = {"alone": NextToken(), "with the teacher": Distillation(teacher, 0.5)}
    steps = {
        name: TrainStep(Network(config), recipe(arguments, rows), world, True, objective=objective)
        for name, objective in objectives.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number, batch in enumerate(batches):
        inputs, targets, _ = tensors(batch)
        for name, step in steps.items():
            begun = time.process_time()
            step.update(number, step.forward_backward(inputs, targets))
            seconds[name].append(time.process_time() - begun)
    median = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    of_student, of_teacher = (
        ModelCosts.of(shape).flops_per_token(arguments.length)["palm"]
        for shape in (config, model.network.config)
    )
    flops = 1 + of_teacher / 3 / of_student
    cost = median["with the teacher"] / median["alone"]
    return {
        "cpu_seconds_a_step": median,
        "cost_over_alone": cost,
        "flops_over_alone": flops,
        "cost_over_the_flop_bound": cost / flops,
        "repeats": len(batches) - 1,
    }


def smoke(arguments: argparse.Namespace) -> None:
    """A tiny model and conversations of its own, in the folder."""
    text = "what is a fox an oak or rye an animal a tree a grass " * 20
    tokenizer = train_bpe([text], 340, reserved=4)
    torch.manual_seed(0)
    network = Network(
        ModelConfig.preset("1M", vocab_size=tokenizer.vocab_size, num_hidden_layers=2)
    )
    arguments.model = arguments.work / "model"
    if not arguments.model.exists():
        arguments.model.mkdir()
        save_checkpoint(arguments.model, network, tokenizer, {})
    answers = ("an animal", "a tree that is a tree", "a grass")
    rows = [
        {
            "turns": [
                {"role": "user", "text": f"what is {i}"},
                {"role": "assistant", "text": answers[i % 3] * (1 + i % 5)},
            ]
        }
        for i in range(120)
    ]
    arguments.talks = arguments.work / "smoke.jsonl"
    arguments.talks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments.conversations, arguments.length, arguments.group = len(rows), 128, 4
    arguments.steps, arguments.repeats = 4, 3
    arguments.student, arguments.student_steps = "1M", 4


def main() -> None:
    """Read the command line, print the results, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--talks", type=Path, help="JSON lines with turns, .gz or not")
    parser.add_argument("--work", type=Path, default=Path("post-training"))
    parser.add_argument("--only", nargs="+", default=["sft", "trl", "kd", "online"])
    parser.add_argument("--conversations", type=int, default=400)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group", type=int, default=8, help="conversations a step, beside TRL")
    parser.add_argument("--steps", type=int, default=20, help="beside TRL")
    parser.add_argument("--repeats", type=int, default=12, help="steps of sft")
    parser.add_argument("--student", default="5M")
    parser.add_argument("--student-steps", type=int, default=60)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.smoke:
        smoke(arguments)
    benchmarks = {"sft": sft, "trl": trl, "kd": kd, "online": online}
    results = {}
    for name in arguments.only:
        results[name] = benchmarks[name](arguments)
        print(name, json.dumps(results[name], indent=2), flush=True)
    if arguments.save:
        record = {
            "benchmark": "post_training",
            "date": datetime.date.today().isoformat(),
            "machine": {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"},
            "threads": torch.get_num_threads(),
            "model": arguments.model.name,
            "settings": {k: getattr(arguments, k) for k in ("conversations", "length", "group")},
            "results": results,
        }
        arguments.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
