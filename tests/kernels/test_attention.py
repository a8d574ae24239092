"""Our causal attention against torch's, value and gradients."""

import pytest
import torch
import torch.nn.functional as F

from mobilellm.distributed.step_kernels import step_kernels
from mobilellm.errors import UserError
from mobilellm.hardware.native_library import native_library
from mobilellm.hardware.probes import compiler_works
from mobilellm.kernels import attention, flash
from mobilellm.kernels.attention import causal_attention
from mobilellm.model.attention_mask import document_mask, masked_attention
from mobilellm.model.attention_spec import AttentionSpec
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.resolve import resolve

SHAPES = [
    (1, 4, 4, 100, 16),
    (2, 6, 2, 64, 8),
    (2, 3, 1, 129, 32),
    (1, 2, 1, 1, 8),
    (1, 2, 2, 1100, 8),
]


def draw(shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Query, key, value and a weight for each number attended, of (B, H, K, T, D)."""
    B, H, K, T, D = shape
    generator = torch.Generator().manual_seed(0)

    def make(heads: int) -> torch.Tensor:
        random = torch.randn(B, T, heads, D, generator=generator)
        return random.transpose(1, 2).detach().requires_grad_()

    return make(H), make(K), make(K), torch.randn(B, H, T, D, generator=generator)


def compare(
    shape: tuple[int, ...], mask: torch.Tensor | None, compiled: bool, tiles: bool = False
) -> None:
    q, k, v, weight = draw(shape)
    ours = causal_attention(q, k, v, mask, compiled, tiles)[0]
    mine = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    theirs = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    expected = torch.autograd.grad((theirs * weight).sum(), (q, k, v))
    assert (ours - theirs).abs().max() < 1e-5
    for a, b in zip(mine, expected, strict=True):
        assert (a - b).abs().max() < 1e-4


def documents(B: int, T: int) -> torch.Tensor:
    """Numbers of documents that end elsewhere in each row."""
    ends = torch.tensor([[7, 70, 71], [1, 64, 99]])[:B]
    return (torch.arange(T)[None, :, None] >= ends[:, None]).sum(-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_equal_torchs(shape: tuple[int, ...]) -> None:
    compare(shape, None, compiled=False)


@pytest.mark.parametrize("window", [None, 30])
def test_documents_and_windows_are_kept_to(window: int | None) -> None:
    shape = (2, 6, 2, 150, 8)
    compare(shape, document_mask(documents(2, 150), spec=AttentionSpec(window)), compiled=False)


def test_compiled_steps_give_the_same() -> None:
    if not compiler_works():
        pytest.skip("no compiler here")
    for shape in SHAPES[1:]:
        compare(shape, None, compiled=True)
    for window in (None, 30):
        mask = document_mask(documents(2, 150), spec=AttentionSpec(window))
        compare((2, 6, 2, 150, 8), mask, compiled=True)


def test_compiled_training_in_bf16_takes_it_with_any_table_of_what_is_seen() -> None:
    """Documents (B, 1, T, T) and windows (T, T) too, as a compiled block gives them."""
    if not compiler_works():
        pytest.skip("no compiler here")
    q, k, v, _ = draw((2, 4, 2, 100, 16))
    window = AttentionSpec(30).sees(torch.arange(100), torch.arange(100))
    for mask in (None, document_mask(documents(2, 100)), window):
        counted = []

        def backend(graph: torch.fx.GraphModule, _: object, found: list = counted) -> object:
            found.extend(
                node for node in graph.graph.nodes if "causal_attention" in str(node.target)
            )
            return graph

        call = torch.compile(masked_attention, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            ours = call(q, k, v, mask, mask is None)
        theirs = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        assert len(counted) == 1
        assert (ours - theirs).abs().max() < 2e-2
        torch._dynamo.reset()


def test_it_is_a_sound_operator() -> None:
    for order in ((0, 1, 2, 3), (0, 2, 1, 3)):  # heads first, and rows first in memory
        q, k, v = (
            torch.randn([(1, n, 20, 8)[i] for i in order]).permute(order).requires_grad_()
            for n in (4, 2, 2)
        )
        torch.library.opcheck(causal_attention, (q, k, v))


@pytest.mark.parametrize("seen", ["causality", "documents"])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 1, 77, 32), (2, 4, 2, 65, 2)])
def test_bf16_is_float32s_but_for_its_rounding(
    shape: tuple[int, ...], tiles: bool, seen: str
) -> None:
    """Odd lengths, and scores so large that few keys have all the weight."""
    if tiles and flash.fault(torch.bfloat16):
        pytest.skip(flash.fault(torch.bfloat16))
    B, H, K, T, D = shape
    mask = None if seen == "causality" else document_mask(documents(B, T))
    exact = draw(shape)
    for factor in (1.0, 8.0):
        short = [t.detach().bfloat16() for t in exact[:3]]
        short = [t.mul(f).requires_grad_() for t, f in zip(short, (factor, 1, 1), strict=True)]
        ours, log_total = causal_attention(*short, mask, False, tiles)
        mine = torch.autograd.grad((ours * exact[3].bfloat16()).sum(), short)
        q, k, v = (t.detach().float().requires_grad_() for t in short)
        theirs = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        expected = torch.autograd.grad((theirs * exact[3].bfloat16().float()).sum(), (q, k, v))
        # Scores in tiles are float32, as torch's operators leave them bfloat16.
        off = 0.01 if tiles else 0.02 * factor
        for a, b in zip((ours, *mine), (theirs, *expected), strict=True):
            assert (a - b).norm() < off * b.norm() + (1e-2 if tiles else 0.05 * factor)
        allowed = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask
        scores = q @ k.repeat_interleave(H // K, 1).transpose(2, 3) * D**-0.5
        hidden = scores.masked_fill(~allowed, float("-inf"))
        assert (log_total.reshape(B, H, T) - hidden.logsumexp(-1)).abs().max() < 0.02 * factor**2
    torch.library.opcheck(causal_attention, (*short, mask, False, tiles))


def test_training_in_bf16_uses_it_and_stays_close_to_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    network = Network(ModelConfig.preset("1M", vocab_size=300))
    ids = torch.randint(0, 300, (2, 100))
    calls = []
    real = attention._blocks
    monkeypatch.setattr(attention, "_blocks", lambda length: calls.append(length) or real(length))
    losses, gradients = [], []
    for precision in Precision:
        network.zero_grad()
        with precision.autocast(torch.device("cpu")):
            loss = network.loss(ids, ids.roll(-1, 1))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        assert bool(calls) == (precision is Precision.BF16)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


def test_tiles_give_values_and_gradients_of_torch_in_any_layout() -> None:
    """Odd lengths, more than one tile of keys, grouped heads, rows or heads first in memory."""
    if flash.fault(torch.float32):
        pytest.skip(flash.fault(torch.float32))
    for shape in [*SHAPES, (2, 3, 1, 77, 32), (1, 4, 2, 600, 64), (3, 2, 2, 65, 2)]:
        q, k, v, weight = draw(shape)
        q, k, v = (t.detach().requires_grad_() for t in (q.contiguous(), k, v.contiguous()))
        out, log_total = flash.attend(q.detach(), k.detach(), v.detach(), None)
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found = flash.gradients(weight, q.detach(), k.detach(), v.detach(), out, log_total, None)
        expected = torch.autograd.grad((theirs * weight).sum(), (q, k, v))
        for a, b in zip((out, *found), (theirs, *expected), strict=True):
            assert (a - b).abs().max() < 1e-5 * max(1.0, b.abs().max().item()), shape
        _, H, K, T, D = shape
        scores = q @ k.repeat_interleave(H // K, 1).transpose(2, 3) * D**-0.5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
        assert (log_total - scores.logsumexp(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("threads", [1, 5])
def test_tiles_divide_few_heads_among_threads(threads: int) -> None:
    """Parts of one head add up, and a mask that differs by row of the batch is kept to: tiles that
    it hides whole are left out."""
    if flash.fault(torch.float32):
        pytest.skip(flash.fault(torch.float32))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare((1, 2, 1, 400, 8), None, False, tiles=True)
        ends = torch.tensor([[7, 300, 301], [1, 64, 399]])
        numbers = (torch.arange(400)[None, :, None] >= ends[:, None]).sum(-1)
        for spec in (AttentionSpec(None), AttentionSpec(30)):
            compare((2, 2, 1, 400, 8), document_mask(numbers, spec=spec), False, tiles=True)
    finally:
        torch.set_num_threads(before)


def test_tiles_are_taken_where_gradients_are_and_the_run_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if flash.fault(torch.float32):
        pytest.skip(flash.fault(torch.float32))
    runs: list[int] = []
    real = flash._run
    monkeypatch.setattr(flash, "_run", lambda *given: runs.append(1) or real(*given))
    q, k, v, weight = draw((2, 4, 2, 100, 16))
    for call in (masked_attention, torch.compile(masked_attention, backend="aot_eager")):
        runs.clear()
        call(q, k, v, None, True)
        assert not runs
        with flash.using_tiles(True):
            for mask in (None, document_mask(documents(2, 100))):
                runs.clear()
                ours = call(q, k, v, mask, mask is None)
                assert len(runs) == 1
                (ours * weight).sum().backward()
                assert len(runs) == 2
            with torch.no_grad():
                call(q, k, v, None, True)
        assert len(runs) == 2
    torch._dynamo.reset()


def test_odd_heads_and_other_types_are_left_to_torch() -> None:
    assert flash.fault(torch.float64)
    q, k, v, _ = draw((1, 2, 1, 20, 5))
    ours = causal_attention(q, k, v, None, False, True)[0]
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (ours - theirs).abs().max() < 1e-5


def test_a_torch_without_these_products_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe().replace("train", attention="auto", compile="block", precision="fp32")
    cpu = torch.device("cpu")
    here = "torch" if flash.fault(torch.float32) else "tiles"
    assert resolve(recipe, cpu).train.attention == here
    monkeypatch.setattr(flash, "RELEASE", "_ZN5other4nameEv")
    flash._library.cache_clear()
    try:
        assert flash.fault(torch.float32)
        assert resolve(recipe, cpu).train.attention == "torch"
        with pytest.raises(
            UserError, match=r'train\.attention = "tiles": (torch 2|this processor)'
        ):
            step_kernels(recipe.replace("train", attention="tiles", compile="off"), cpu)
    finally:
        flash._library.cache_clear()


def test_it_compiles_where_there_is_a_compiler() -> None:
    fault = native_library(flash.SOURCE, "-fopenmp").fault
    assert fault in ("", "there is no C++ compiler (g++ or clang++)")


def test_the_description_is_as_long_as_in_c() -> None:
    """A field that is on one side alone would shift all that follow."""
    sizes = {kind.__name__: flash.ctypes.sizeof(kind) for kind in (flash._Array, flash._Attention)}
    assert sizes == {"_Array": 32, "_Attention": 384}
