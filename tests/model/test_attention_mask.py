"""A document inside a sample, masked, is the same document alone."""

import pytest
import torch

from mobilellm.model.attention_mask import document_mask, masked_attention
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network

LENGTHS = (1, 30, 7, 22)


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 300, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    documents = torch.repeat_interleave(
        torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)
    ).unsqueeze(0)
    return ids, documents


@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_repeats": 2}, {"layer_repeats": 2, "shared_kv": "first"}, {"qk_norm": True}],
)
def test_loss_and_gradients_equal_each_document_alone(changes: dict) -> None:
    torch.manual_seed(0)
    network = Network(ModelConfig.preset("1M", vocab_size=300, **changes))
    ids, documents = packed()
    targets = ids.roll(-1, dims=1)
    whole = network.loss(ids, targets, "sum", documents)
    whole.backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    alone = [
        network.loss(x, y, "sum")
        for x, y in zip(ids.split(LENGTHS, 1), targets.split(LENGTHS, 1), strict=True)
    ]
    torch.stack(alone).sum().backward()
    assert whole.item() == pytest.approx(torch.stack(alone).sum().item(), rel=1e-6)
    for mine, parameter in zip(gradients, network.parameters(), strict=True):
        assert (mine - parameter.grad).abs().max() < 1e-5 * parameter.grad.abs().max() + 1e-7
    assert (
        abs(network.loss(ids, targets, "sum").item() - whole.item()) > 0.01
    )  # without the mask it is another loss


def test_the_block_mask_allows_what_the_table_allows() -> None:
    _, documents = packed()
    documents = torch.cat((documents, documents.flip(1).neg()))
    q, k, v = (
        torch.randn(2, heads, sum(LENGTHS), 16, generator=torch.Generator().manual_seed(heads))
        for heads in (4, 2, 2)
    )
    table, block = document_mask(documents, flex=False), document_mask(documents, flex=True)
    assert isinstance(table, torch.Tensor)
    assert not isinstance(block, torch.Tensor)
    expected = masked_attention(q, k, v, table, causal=False)
    assert (masked_attention(q, k, v, block, causal=False) - expected).abs().max() < 1e-5
