"""The Conformer: padding, conditions, positions, any length."""
import pytest
import torch

import conformer

WIDTH, TOKEN = 16, 8


def make(layers=2, dropout=0.0):
    torch.manual_seed(0)
    model = conformer.Conformer(layers, WIDTH, 2, 2, 5, TOKEN, dropout)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.05 * torch.randn_like(p))
    return model.eval()


def inputs(b=2, n=12, length=6):
    torch.manual_seed(1)
    return (torch.randn(b, n, WIDTH), torch.randn(b, WIDTH), torch.randn(b, n, WIDTH),
            torch.randn(b, length, TOKEN))


def test_padding_changes_no_valid_frame():
    """Frames behind the mask may hold anything: attention and the convolution do not see them."""
    model, (x, time, speech, tokens) = make(), inputs()
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    other = x.clone()
    other[1, 7:] += 5
    a, b = (model(v, time, speech, tokens, mask) for v in (x, other))
    torch.testing.assert_close(a[mask], b[mask])
    alone = model(x[1:, :7], time[1:], speech[1:, :7], tokens[1:])
    torch.testing.assert_close(a[1:, :7], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_every_input_counts(changed):
    """The result depends on the noisy motion, on time, on speech and on the reference's tokens."""
    model, given = make(), inputs()
    other = list(given)
    other[changed] = other[changed] + .5 * torch.randn_like(other[changed])
    assert (model(*given) - model(*other)).abs().max() > 1e-3


def test_every_block_gets_every_condition():
    """Time, speech and reference have gradients in each block of their own."""
    model, given = make(3), inputs()
    model(*given).square().sum().backward()
    for block in model.blocks:
        for layer in (block.time, block.speech, block.cross.kv, block.cross.q):
            assert layer.weight.grad.abs().sum() > 0


def test_speech_is_added_frame_by_frame():
    """Without attention and convolution, speech at frame k changes frame k alone (sec. 4.3)."""
    model, (x, time, speech, tokens) = make(1), inputs()
    block = model.blocks[0]
    torch.nn.init.zeros_(block.attention.out.weight)
    torch.nn.init.zeros_(block.convolution.depthwise.weight)
    other = speech.clone()
    other[:, 4] += 1
    moved = (model(x, time, speech, tokens) - model(x, time, other, tokens)).abs().sum((0, 2))
    assert moved[4] > 1e-3 and moved[[k for k in range(12) if k != 4]].max() < 1e-6


def test_attention_by_hand():
    """Self-attention is softmax(q k^T / sqrt(d) + bias) v, the bias read by clipped distance."""
    torch.manual_seed(0)
    layer = conformer.SelfAttention(WIDTH, 2, 0.0).eval()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(1, 100, WIDTH)
    q, k, v = layer.qkv(layer.norm(x)).chunk(3, -1)
    out = []
    for h in range(2):
        part = slice(h * 8, h * 8 + 8)
        scores = q[..., part] @ k[..., part].mT / 8 ** .5
        distance = (torch.arange(100)[None] - torch.arange(100)[:, None]).clamp(-64, 64) + 64
        out.append((scores + layer.bias[h][distance]).softmax(-1) @ v[..., part])
    wanted = layer.out(torch.cat(out, -1))
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)


def test_cross_attention_by_hand():
    """Frames ask by their normalised selves; the tokens' values answer in shares that sum to 1."""
    layer, (x, _, _, tokens) = make(1).blocks[0].cross, inputs()
    q, (k, v) = layer.q(layer.norm(x)), layer.kv(layer.token_norm(tokens)).chunk(2, -1)
    out = []
    for head in range(2):
        at = slice(head * WIDTH // 2, (head + 1) * WIDTH // 2)
        score = torch.einsum("bnd,bld->bnl", q[..., at], k[..., at]) / (WIDTH // 2) ** .5
        share = score.exp() / score.exp().sum(-1, keepdim=True)
        out.append(torch.einsum("bnl,bld->bnd", share, v[..., at]))
    wanted = layer.out(torch.cat(out, -1))
    torch.testing.assert_close(layer(x, tokens), wanted, atol=1e-5, rtol=1e-4)


def test_block_by_hand():
    """Half feed-forward, self-attention, cross-attention, convolution, half feed-forward, norm."""
    block, (x, time, speech, tokens) = make(1).blocks[0], inputs()
    x_in = x + block.time(time)[:, None] + block.speech(speech)
    a = x_in + .5 * block.first(x_in)
    b = a + block.attention(a)
    c = b + block.cross(b, tokens)
    d = c + block.convolution(c)
    torch.testing.assert_close(block(x, time, speech, tokens), block.norm(d + .5 * block.second(d)))


def test_convolution_by_hand():
    """Pointwise, gate, each channel mixed over time by its own kernel, norm, SiLU, pointwise."""
    layer, (x, *_) = make(1).blocks[0].convolution, inputs(1)
    value, gate = layer.widen(layer.norm(x)).chunk(2, -1)
    padded = torch.nn.functional.pad(value * gate.sigmoid(), (0, 0, 2, 2))  # (1, 16, D)
    mixed = sum(padded[:, k:k + 12] * layer.depthwise.weight[:, 0, k] for k in range(5))
    inner = layer.inner_norm(mixed + layer.depthwise.bias)
    torch.testing.assert_close(layer(x), layer.out(inner * inner.sigmoid()), atol=1e-5, rtol=1e-4)


def test_only_distances_count():
    """The same frames behind 40 padded ones give the same result: positions are relative."""
    model, (x, time, speech, tokens) = make(), inputs(1)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.bias)
    mask = torch.arange(52)[None] >= 40
    late = [torch.cat([torch.randn(1, 40, WIDTH), v], 1) for v in (x, speech)]
    shifted = model(late[0], time, late[1], tokens, mask)[:, 40:]
    torch.testing.assert_close(shifted, model(x, time, speech, tokens), atol=1e-5, rtol=1e-4)


def test_longer_than_any_distance_it_knows():
    """Three hundred frames run, and what is further away than REACH may change places."""
    model, (x, time, speech, tokens) = make(), inputs(1, 300)
    assert model(x, time, speech, tokens).isfinite().all()
    layer = model.blocks[0].attention
    torch.nn.init.normal_(layer.bias)
    far, near = x.clone(), x.clone()
    far[:, [100, 250]], near[:, [10, 250]] = x[:, [250, 100]], x[:, [250, 10]]
    torch.testing.assert_close(layer(far)[:, 0], layer(x)[:, 0], atol=1e-5, rtol=1e-4)
    assert (layer(near)[:, 0] - layer(x)[:, 0]).abs().max() > 1e-4


def test_dropout_reaches_every_place_it_is_asked_for():
    """In training each dropping layer makes the result random; in evaluation nothing does."""
    model, given = make(dropout=.5), inputs()
    torch.testing.assert_close(model(*given), model(*given))
    for part in ("first", "attention", "cross", "convolution", "second"):
        model.eval()
        getattr(model.blocks[0], part).train()
        assert (model(*given) - model(*given)).abs().max() > 1e-4


def test_attention_drops_both_its_weights_and_its_result(monkeypatch):
    """With the result's dropout off the weights still drop; a constant result shows its own."""
    block, (x, _, _, tokens) = make(1, dropout=.5).blocks[0].train(), inputs()
    for layer, extra in ((block.attention, ()), (block.cross, (tokens,))):
        torch.nn.init.zeros_(layer.out.weight)
        torch.nn.init.ones_(layer.out.bias)
        assert set(layer(x, *extra).unique().tolist()) == {0., 2.}
    torch.nn.init.eye_(block.attention.out.weight)
    monkeypatch.setattr(conformer.F, "dropout", lambda v, *_: v)
    assert (block.attention(x) - block.attention(x)).abs().max() > 1e-4
