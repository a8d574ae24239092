"""Log-likelihoods of the engine against lm-eval's own Hugging Face backend, on the same tiny
weights."""

from pathlib import Path

import pytest
import torch
from tests.tasks.harness_peer import CONTEXT, PAIRS, agree, harness_results, items_of

from mobilellm.errors import UserError
from mobilellm.interop.folder import save_checkpoint
from mobilellm.kernels import bf16x6
from mobilellm.kernels.products import products_fault
from mobilellm.model import linear as linear_module
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.tasks import engine as engine_module
from mobilellm.tasks.engine import Engine, NetworkBackend, token_loglikelihoods
from mobilellm.tasks.requests import Item, OwnEncoder, Result, encode, group, request
from mobilellm.tasks.result_cache import ResultCache
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:40_000]], 400)


@pytest.fixture(scope="module", params=["plain", "untied"])
def network(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Network:
    torch.manual_seed(1)
    more = {"tie_word_embeddings": request.param == "plain"}
    config = ModelConfig.preset(
        "1M",
        vocab_size=tokenizer.vocab_size,
        num_hidden_layers=3,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        **more,
    )
    return Network(config).eval()


@pytest.mark.parametrize("batch_tokens", [1, 200, 5000])
def test_scores_equal_the_harness(
    network: Network, tokenizer: Tokenizer, sample_text: str, tmp_path: Path, batch_tokens: int
) -> None:
    save_checkpoint(tmp_path, network, tokenizer, {})
    drawn, keys = items_of(sample_text, 25, batch_tokens)
    pairs = PAIRS + drawn
    requests = encode(pairs, OwnEncoder(tokenizer), CONTEXT)
    found = Engine(NetworkBackend(network), batch_tokens).score(
        requests, [*range(-len(PAIRS), 0), *keys]
    )
    agree(found, harness_results(tmp_path, pairs))
    assert any(result.cut for result in requests)


@pytest.mark.parametrize("at_once", [1, 1 << 21])
def test_a_vocabulary_in_parts_has_the_softmax_of_the_whole(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(4)
    hidden, weight = 4 * torch.randn(60, 16), torch.randn(3000, 16)
    logprobs = (hidden.double() @ weight.double().t()).log_softmax(-1)
    likeliest = logprobs.argmax(1)
    assert set((likeliest // 1024).tolist()) == {0, 1, 2}  # every part has its winners
    targets = torch.where(torch.arange(60) % 2 == 0, likeliest, torch.randint(3000, (60,)))
    values, greedy = token_loglikelihoods(hidden, weight, targets, torch.arange(60))
    torch.testing.assert_close(
        values.double(), logprobs.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-4
    )
    assert greedy.tolist() == (likeliest == targets).tolist()


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("fastest", ["torch", "bf16x6"])
def test_float32_is_multiplied_by_what_is_fastest(
    network: Network,
    tokenizer: Tokenizer,
    precision: Precision,
    fastest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores stay float32's; bf16 keeps torch's own products."""
    if reason := products_fault("bf16x6"):
        pytest.skip(reason)
    requests = encode(PAIRS, OwnEncoder(tokenizer), CONTEXT)
    keys = list(range(len(PAIRS)))
    torch_s_own = Engine(NetworkBackend(network, precision)).score(requests, keys)
    called = []
    real = bf16x6.multiply
    monkeypatch.setattr(bf16x6, "multiply", lambda *a, **k: called.append(1) or real(*a, **k))
    monkeypatch.setattr(linear_module, "fastest_products", lambda _: fastest)
    found = Engine(NetworkBackend(network, precision)).score(requests, keys)
    assert bool(called) == (precision is Precision.FP32 and fastest == "bf16x6")
    for one, other in zip(found, torch_s_own, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=2e-4)
        assert one.greedy == other.greedy


def test_greedy_is_noticed(network: Network) -> None:
    beginning = [1, 2, 3]
    best = list(network.generate(beginning, 4, stop=[]))
    wrong = [*best[:3], (best[3] + 1) % network.config.vocab_size]
    found = Engine(NetworkBackend(network)).score(
        [request(beginning + end, 4, CONTEXT) for end in (best, wrong)], [0, 0]
    )
    assert [result.greedy for result in found] == [True, False]


@pytest.mark.parametrize(
    "more", [{"layer_repeats": 2, "shared_kv": "own"}, {"layer_repeats": 2, "shared_kv": "first"}]
)
def test_shared_layers_score_as_one_sequence_at_a_time(
    tokenizer: Tokenizer, sample_text: str, more: dict[str, object]
) -> None:
    torch.manual_seed(2)
    network = Network(
        ModelConfig.preset("1M", vocab_size=400, num_hidden_layers=2, initializer_range=0.2, **more)
    ).eval()
    pairs, keys = items_of(sample_text, 10, 5)
    requests = encode(pairs, OwnEncoder(tokenizer), 512)
    for each, result in zip(
        requests, Engine(NetworkBackend(network), 300).score(requests, keys), strict=True
    ):
        with torch.no_grad():
            logprobs = network(torch.tensor([each.inputs]))[0, -each.scored :].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(each.targets)[:, None]).sum().item()
        assert result.loglikelihood == pytest.approx(expected, abs=1e-4)


class Counting:
    """A backend that counts what it computes and can run out of memory."""

    max_length = 64
    pads = True

    def __init__(self, most: int = 1 << 30) -> None:
        self.most, self.batches = most, list[int]()

    def order(self, item: Item) -> tuple[int, ...]:
        return (-item.length,)

    def cost(self, item: Item) -> int:
        return item.length

    def score(self, items: list[Item]) -> list[list[Result]]:
        lengths = [item.length for item in items]
        tokens = len(items) * max(lengths) if self.pads else sum(lengths)
        if tokens > self.most:
            raise MemoryError
        self.batches.append(tokens)
        return [
            [Result(-float(each.tokens[-1]), False) for each in item.requests] for item in items
        ]


def test_a_context_is_computed_once_and_one_token_choices_add_nothing() -> None:
    context = list(range(1, 31))
    requests = [request([*context, choice], 1, 64) for choice in (40, 41, 42)]
    requests += [request([*context, 50, 51, 52], 3, 64), request([*context, 60], 1, 64)]
    backend = Counting()
    found = Engine(backend).score(requests, [0, 0, 0, 1, 2])
    assert backend.batches == [32 * 3]
    assert [result.loglikelihood for result in found] == [-40, -41, -42, -52, -60]
    assert [item.length for item in group(requests[:3], [0, 0, 0])] == [30]


def test_the_longest_come_first_and_a_batch_halves_when_memory_runs_out() -> None:
    requests = [request(list(range(n)), 1, 64) for n in (5, 30, 9, 31, 17, 6, 8)]
    backend = Counting(70)
    found = Engine(backend, 1000).score(requests, range(7))
    assert [result.loglikelihood for result in found] == [-4, -29, -8, -30, -16, -5, -7]
    # A batch of all seven is 7 x 30 tokens, one of three 3 x 30: both too large, so that the budget
    # comes down to 30 tokens, which hold the three short ones together.
    assert backend.batches == [30, 29, 16, 3 * 8, 4]
    with pytest.raises(UserError, match="single item of 30 tokens"):
        Engine(Counting(20)).score(requests, range(7))


def test_a_batch_without_padding_halves_by_its_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(list(range(n)), 1, 64) for n in (5, 30, 9, 31, 17, 6, 8)]
    monkeypatch.setattr(Counting, "pads", False)
    backend = Counting(70)
    Engine(backend, 1000).score(requests, range(7))
    # All seven are 99 tokens, too many; half of that holds 30, then 29 and 16, then the rest.
    assert backend.batches == [30, 29 + 16, 8 + 7 + 5 + 4]


def test_equal_requests_are_computed_once() -> None:
    backend, each = Counting(), request([1, 2, 3], 1, 64)
    assert len(Engine(backend).score([each] * 5, range(5))) == 5
    assert backend.batches == [2]


def test_what_cannot_be_scored_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no token of its own"):
        encode([("a context", "")], OwnEncoder(tokenizer), 64)
    assert encode([("  ", "x")], OwnEncoder(tokenizer), 64) == encode(
        [("", "  x")], OwnEncoder(tokenizer), 64
    )
    with pytest.raises(UserError, match="context is 8"):
        encode([("a", "x" * 200)], OwnEncoder(tokenizer), 8)


def test_the_cache_continues_behind_a_torn_line(tmp_path: Path) -> None:
    requests = [request([1, 2, n], 1, 64) for n in range(4)]
    path = tmp_path / "deep" / "cache.jsonl"
    with ResultCache(path) as cache:
        cache.add(requests[:3], [Result(-0.125 * n, n == 1) for n in range(3)])
    path.write_bytes(path.read_bytes()[:-4])
    with ResultCache(path) as cache:
        assert [cache.get(each) for each in requests] == [
            Result(0.0, False),
            Result(-0.125, True),
            None,
            None,
        ]
        cache.add(requests[2:], [Result(-2.5, True), Result(-3.5, False)])
    with ResultCache(path) as cache:
        assert cache.get(requests[2]) == Result(-2.5, True)
        assert cache.get(requests[3]) == Result(-3.5, False)
        assert cache.get(request([1, 2, 0], 2, 64)) is None  # the same tokens, more of them scored


class Merging:
    """An encoder of a token for each character, but "ab" is one token."""

    prefix_id = 0

    def encode_batch(self, texts: list[str], special: bool) -> list[list[int]]:
        return [[0] * special + list(map(ord, text.replace("ab", "!"))) for text in texts]


def test_a_continuation_that_merges_into_its_context_is_encoded_by_itself() -> None:
    first, second = encode([("xa", "b"), ("xa", "c")], Merging(), 64)
    assert (first.tokens, first.scored, first.apart) == ((0, *map(ord, "xab")), 1, True)
    assert (second.tokens, second.scored, second.apart) == ((0, *map(ord, "xac")), 1, False)
    with pytest.raises(UserError, match="no token of its own"):
        encode([("xa", "")], Merging(), 64)
