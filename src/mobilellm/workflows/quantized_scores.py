"""What quantizing a finished run costs it on its own held-out text.

    scores = score_quantized(Path("runs/mine"), ["w8a8"])
    scores["w8a8"]["added_bits_per_byte"]

Each scheme rounds the run's weights to the nearest integers, with scales by the largest number of a
row or group (method "round", the paper's min-max), and activations where the scheme does. The run
itself is scored beside them in float32, since a training may score in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mobilellm.evaluate.held_out import held_out
from mobilellm.files import read_json, write_json
from mobilellm.interop.load import load
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.quantize.activations import rounded_activations
from mobilellm.quantize.methods import quantized_network
from mobilellm.records import QuantizedFigures
from mobilellm.train.inputs import open_data
from mobilellm.train.run_folder import read_recipe

FLOAT = "float"
"""The name under which the run itself stands, in float32."""


def score_quantized(run: Path, schemes: Sequence[str]) -> dict[str, QuantizedFigures]:
    """Score a finished run as it is and by each of `schemes`, and add that to its result.json.

    `UserError` for a width that a scheme's groups do not divide.
    """
    result, recipe = read_json(run / "result.json"), read_recipe(run)
    data, path = open_data(recipe), run / result["checkpoint"]

    def scored(network: Network) -> float:
        length = recipe.data.sequence_length
        found = held_out(network, data, sequence_length=length, precision=Precision.FP32)
        return found.bits_per_byte

    bits = {FLOAT: scored(load(path).network)}
    for scheme in schemes:
        network = load(path).network  # quantizing changes its weights
        quantized = quantized_network(network, scheme, "round", "int8")
        bits[scheme] = scored(rounded_activations(network, quantized))
    found = {
        name: QuantizedFigures(bits_per_byte=value, added_bits_per_byte=value - bits[FLOAT])
        for name, value in bits.items()
    }
    write_json(run / "result.json", result | {"quantized": found})
    return found
