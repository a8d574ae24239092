"""Calls of an untrained model that is held to schemas: how many parse, and what holding costs.

    python benchmarks/schema_calls.py --tokenizer MODEL --save benchmarks/results/schema_calls.json

A network with random weights writes calls of functions, each held to its schema, from temperature
1, and jsonschema says which are valid. The same number is written without a schema for comparison.
What holding costs is timed by itself, a token: the mask, and noting the token that was drawn.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import torch

from mobilellm.calls.held import HeldTo, call_schema
from mobilellm.hardware.description import describe
from mobilellm.model.config import ModelConfig
from mobilellm.model.generation import Sampling
from mobilellm.model.network import Network
from mobilellm.runtimes.ours import NetworkSession
from mobilellm.runtimes.running import generate
from mobilellm.tokenizer.tokenizer import Tokenizer

TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
DATE = {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}
PARAMETERS: dict[str, dict[str, Any]] = {
    "find_restaurants": {"city": TEXT, "cuisine": {"enum": ["Italian", "Thai"]}, "seats": WHOLE},
    "book_table": {"name": TEXT, "date": DATE, "seats": {**WHOLE, "minimum": 1, "maximum": 12}},
    "weather": {"city": TEXT, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "transfer": {"amount": NUMBER, "to": TEXT, "confirmed": {"type": "boolean"}},
    "route": {"stops": {"type": "array", "items": TEXT, "minItems": 2, "maxItems": 6}},
    "draw": {"points": {"type": "array", "items": {"type": "array", "items": NUMBER}}},
    "remind": {"text": {**TEXT, "maxLength": 60}, "at": {"type": ["string", "null"]}},
    "order": {
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"item": TEXT, "count": WHOLE},
                "required": ["item", "count"],
                "additionalProperties": False,
            },
        }
    },
    "set_light": {"room": TEXT, "level": {**WHOLE, "minimum": 0, "maximum": 100}},
    "now": {},
}


def tools() -> list[dict[str, Any]]:
    """Functions in OpenAI's form; the last parameter of each can be left out."""
    found = []
    for name, properties in PARAMETERS.items():
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:-1] or list(properties),
            "additionalProperties": False,
        }
        found.append({"type": "function", "function": {"name": name, "parameters": schema}})
    return found


def valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether the text is JSON that the schema allows."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, RecursionError, jsonschema.ValidationError):
        return False
    return True


def main() -> None:
    """Write, check and time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model or its tokenizer")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--limit", type=int, default=25, help="tokens of a call")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.tokenizer)
    stop = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    torch.manual_seed(0)
    network = Network(
        ModelConfig.preset("1M", vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    ).eval()
    session = NetworkSession(network)
    offered = tools()
    schemas = [*(call_schema([tool]) for tool in offered), call_schema(offered)]
    start = time.perf_counter()
    grammars = [
        HeldTo(schema, tokenizer, vocab_size=tokenizer.vocab_size, stop=stop) for schema in schemas
    ]
    ready = (time.perf_counter() - start) / len(grammars)
    parsed = {"held": 0, "free": 0}
    tokens = dict.fromkeys(parsed, 0)
    seconds = dict.fromkeys(parsed, 0.0)
    closed, costs = 0, []
    prompt = tokenizer.encode("Call a function: ")
    for number in range(arguments.calls):
        schema, grammar = schemas[number % len(schemas)], grammars[number % len(schemas)]
        sampling = Sampling(temperature=1.0, seed=number)
        for kind in parsed:
            session.reset()
            held = grammar.begin() if kind == "held" else None
            start = time.perf_counter()
            ids = list(generate(session, prompt, arguments.limit, sampling, stop, held))
            seconds[kind] += time.perf_counter() - start
            tokens[kind] += len(ids)
            if held is not None:
                again, flat = grammar.begin(), np.zeros(tokenizer.vocab_size, np.float32)
                for token in ids:
                    start = time.perf_counter()
                    again.masked(flat)
                    again.take(token)
                    costs.append(time.perf_counter() - start)
                ids += (ending := held.closing())
                closed += bool(ending)
            parsed[kind] += valid(tokenizer.decode(ids, skip_special_tokens=True), schema)
    result = {
        "vocabulary": tokenizer.vocab_size,
        "calls": arguments.calls,
        "valid_held": parsed["held"],
        "valid_free": parsed["free"],
        "closed_at_the_limit": closed,
        "limit": arguments.limit,
        "milliseconds_to_make_ready": round(ready * 1e3, 1),
        "microseconds_a_token_median": round(float(np.median(costs)) * 1e6, 1),
        "microseconds_a_token_mean": round(float(np.mean(costs)) * 1e6, 1),
        "microseconds_a_token_p99": round(float(np.percentile(costs, 99)) * 1e6, 1),
        "microseconds_a_token_of_the_1M_network": round(seconds["free"] / tokens["free"] * 1e6, 1),
        "date": datetime.date.today().isoformat(),
        "machine": {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"},
    }
    print(
        f"{parsed['held']} of {arguments.calls} calls valid when held to their schemas "
        f"({closed} closed at the limit of {arguments.limit} tokens), {parsed['free']} when not"
    )
    print(
        f"holding costs {result['microseconds_a_token_median']} us a token (median; mean "
        f"{result['microseconds_a_token_mean']}, 99 % below {result['microseconds_a_token_p99']}), "
        f"a vocabulary of {tokenizer.vocab_size:,}; {ready * 1e3:.0f} ms to make a schema ready"
    )
    if arguments.save:
        arguments.save.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
