"""llama.cpp's server on loopback, as a reference for ids and log-probabilities."""

import json
import urllib.request
from pathlib import Path


class LlamaCpp:
    """llama.cpp's server on loopback, with an F32 cache."""

    def __init__(self, path: Path) -> None:
        import xllamacpp as x

        parameters = x.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = (
            1024,
            1,
            False,
            -1,
        )
        parameters.cache_type_k = parameters.cache_type_v = x.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = (
            x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )  # it rounds to F16 on the way
        parameters.cpuparams.n_threads = 2
        self.server = x.Server(parameters)

    def tokenize(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(
            self.server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return list(json.load(reply)["tokens"])

    def next_logprobs(self, ids: list[int], count: int) -> dict[int, float]:
        """The likeliest `count` next tokens with their log-probabilities."""
        body = {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": count,
            "temperature": 0.0,
            "cache_prompt": True,
        }
        reply = self.server.handle_completions(body)
        reply = json.loads(reply) if isinstance(reply, str) else reply
        found = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in found}

    def stops(self, ids: list[int], count: int) -> bool:
        """Whether greedy generation ends by itself within `count` tokens after `ids`."""
        body = {"prompt": ids, "n_predict": count, "temperature": 0.0, "cache_prompt": False}
        reply = self.server.handle_completions(body)
        reply = json.loads(reply) if isinstance(reply, str) else reply
        return bool(reply["choices"][0]["finish_reason"] == "stop")
