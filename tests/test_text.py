"""The text encoders, against torch's own transformer and pairs joined by hand."""

import gzip
import json

import numpy as np
import pytest
import torch
from torch import nn

import data
import diffusion
import text
import train_diffusion


def theirs(block, heads, activation):
    """torch's layer with a block's weights."""
    width = block.out.weight.shape[0]
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, activation, batch_first=True,
                                       norm_first=True)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.qkv.bias)
        for mine, other in ((block.out, layer.self_attn.out_proj), (block.fc1, layer.linear1),
                            (block.fc2, layer.linear2), (block.norm1, layer.norm1),
                            (block.norm2, layer.norm2)):
            other.weight.copy_(mine.weight), other.bias.copy_(mine.bias)
    return layer.train()                                        # not the fused path


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_is_torchs_own(causal):
    """The same weights give the same numbers, with a causal mask and with padding."""
    torch.manual_seed(0)
    block = text.Block(16, 2, causal, text.quick_gelu)
    for p in block.parameters():
        nn.init.normal_(p, std=.3)
    x = torch.randn(3, 7, 16)
    real = torch.arange(7) < torch.tensor([[7], [4], [1]])
    mask = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1) if causal else None
    wanted = theirs(block, 2, text.quick_gelu)(x, mask, None if causal else ~real)
    got = block(x, None if causal else real)
    keep = torch.ones_like(real) if causal else real
    torch.testing.assert_close(got[keep], wanted[keep], atol=1e-5, rtol=1e-5)


def test_bytes_end_where_the_text_ends():
    """Padding changes nothing; case and blanks do not matter; other letters do."""
    torch.manual_seed(0)
    encoder = text.ByteEncoder(16, 2, 2).eval()
    rows = text.to_bytes(["Please  smile ", "please smile", "please smirk"])
    assert torch.equal(rows[0], rows[1])
    made = encoder(rows)
    torch.testing.assert_close(made, encoder(rows[:, :14]))
    assert (made[1] - made[2]).abs().max() > 1e-3
    assert encoder(text.to_bytes([""])).isfinite().all()


def write_merges(path, pairs):
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["merges.txt", "bpe.txt.gz"])
def test_pairs_join_in_the_order_of_the_file(tmp_path, name):
    """By hand: l o w</w> -> lo w</w> -> low</w>; lower keeps its parts; unknown pairs stay apart."""
    path = write_merges(tmp_path / name, [("l", "o"), ("e", "r</w>"), ("lo", "w</w>"), ("lo", "w")])
    pairs = text.BytePairs(path)
    assert pairs.word("low") == ["low</w>"]
    assert pairs.word("lower") == ["low", "er</w>"]
    assert pairs.word("slow") == ["s", "low</w>"]
    tokens = pairs(["Low,  lower &amp; 2"])[0].tolist()
    names = {k: v for v, k in pairs.number.items()}
    assert [names[t] for t in tokens[:8]] == [
        text.START, "low</w>", ",</w>", "low", "er</w>", "&</w>", "2</w>", text.END]
    assert set(tokens[8:]) == {pairs.number[text.END]} and len(tokens) == 77
    assert pairs(["low " * 100])[0, -1] == pairs.number[text.END]
    assert len(pairs.number) == 2 * 256 + 4 + 2


def test_letters_of_bytes_are_clips():
    """256 different printable letters; a blank becomes the letter 256 + 32."""
    letters = text.byte_letters()
    assert len(set(letters.values())) == 256 and letters[ord("a")] == "a"
    assert letters[ord(" ")] == chr(256 + 32) and list(letters)[0] == ord("!")


def hugging_face(model):
    """The state dict that transformers' CLIPModel would have with a ClipText's weights, and some of
    the picture's side, which must not matter."""
    state = {"vision_model.post_layernorm.weight": torch.zeros(3), "logit_scale": torch.zeros(()),
             "text_model.embeddings.position_ids": torch.arange(77)[None],
             "text_model.embeddings.token_embedding.weight": model.token.weight,
             "text_model.embeddings.position_embedding.weight": model.position,
             "text_model.final_layer_norm.weight": model.norm.weight,
             "text_model.final_layer_norm.bias": model.norm.bias,
             "text_projection.weight": model.projection.weight}
    names = {"self_attn.out_proj": "out", "layer_norm1": "norm1", "layer_norm2": "norm2",
             "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    for k, block in enumerate(model.blocks):
        for kind in ("weight", "bias"):
            for theirs_name, ours in names.items():
                state[f"text_model.encoder.layers.{k}.{theirs_name}.{kind}"] = \
                    getattr(getattr(block, ours), kind)
            for c, part in zip("qkv", getattr(block.qkv, kind).chunk(3)):
                state[f"text_model.encoder.layers.{k}.self_attn.{c}_proj.{kind}"] = part
    return {name: v.detach().clone() for name, v in state.items()}


def write_safetensors(path, state):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, v in state.items():
        data = v.numpy().tobytes()
        kind = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}[v.dtype]
        header[name] = {"dtype": kind, "shape": list(v.shape),
                        "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    told = json.dumps(header).encode()
    path.write_bytes(len(told).to_bytes(8, "little") + told + body)


@pytest.fixture
def clip_folder(tmp_path):
    """A small CLIP text encoder with random weights, as files."""
    torch.manual_seed(1)
    write_merges(tmp_path / "merges.txt", [("l", "o"), ("lo", "w</w>"), ("e", "r</w>"), ("lo", "w")])
    model = text.ClipText(2 * 256 + 6, 128, 2, 2, 32).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=.1)
    return tmp_path, model


@pytest.mark.parametrize("kind, half", [("safetensors", False), ("safetensors", True), ("bin", False)])
def test_public_weights_are_read_in_their_layout(clip_folder, kind, half):
    """Files as transformers writes them give the encoder that wrote them; the vector is that of the
    end token, so what follows it does not matter, and what comes before does."""
    folder, model = clip_folder
    state = hugging_face(model)
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        write_safetensors(folder / "model.safetensors", state)
    encode, words = text.load_clip(folder), ["low lower", "lower low", "low"]
    made = encode(words)
    tokens = text.BytePairs(folder / "merges.txt")(words)
    with torch.no_grad():
        torch.testing.assert_close(made, model(tokens), atol=3e-3 if half else 1e-6, rtol=0)
        tokens[2, 5:] = 7                                           # behind its end token
        torch.testing.assert_close(model(tokens)[2], made[2], atol=3e-3, rtol=0)
    assert made.shape == (3, 32) and (made[0] - made[1]).abs().max() > 1e-3


@pytest.mark.parametrize("spoil, named", [
    (lambda folder: (folder / "merges.txt").unlink(), "merges.txt"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678 no"), "model.safetensors"),
    (lambda folder: write_safetensors(folder / "model.safetensors", {"a": torch.zeros(2)}), "not CLIP")])
def test_broken_public_weights_are_named(clip_folder, spoil, named):
    folder, model = clip_folder
    write_safetensors(folder / "model.safetensors", hugging_face(model))
    spoil(folder)
    with pytest.raises(ValueError, match=named):
        text.load_clip(folder)


def test_clip_is_what_transformers_makes_of_it(clip_folder):
    """transformers' own tokenizer and model, where they are installed, agree."""
    transformers = pytest.importorskip("transformers")
    folder, model = clip_folder
    write_safetensors(folder / "model.safetensors", hugging_face(model))
    pairs = text.BytePairs(folder / "merges.txt")
    (folder / "vocab.json").write_text(json.dumps(pairs.number))
    theirs_pairs = transformers.CLIPTokenizer(folder / "vocab.json", folder / "merges.txt")
    words = ["Lower the low,  smile!", "it's 42 o'clock & a_b", "x" * 200, "\u00fcn\u00efcode \u65e5\u672c"]
    tokens = theirs_pairs(words, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert pairs(words).tolist() == tokens
    config = transformers.CLIPTextConfig(
        vocab_size=len(pairs.number), hidden_size=128, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=32, eos_token_id=pairs.number[text.END])
    other = transformers.CLIPTextModelWithProjection(config).eval()
    state = {k: v for k, v in hugging_face(model).items() if k.startswith("text_")}
    state.pop("text_model.embeddings.position_ids")
    other.load_state_dict(state)
    with torch.no_grad():
        wanted = other(input_ids=torch.tensor(tokens)).text_embeds
    torch.testing.assert_close(text.load_clip(folder)(words), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("told", [True, False])
def test_words_are_learnt_from_how_the_head_looked_before(told):
    """Of a head that is told something S sees the first frame, which does not show it yet; of one
    that speaks, any."""
    n = 100
    item = {"motion": torch.arange(n).view(n, 1, 1, 1).expand(n, 2, 70, 1).half(), "steered": False,
            "landmarks": np.zeros((n, 70, 2), np.float32), "pose": np.zeros((n, 3), np.float32)}
    times = {"said": np.zeros(n, int), "since": np.arange(n)}
    item |= {"letters": text.to_bytes(["a", "b"]).numpy()} | times if told else \
        {"speech": np.zeros((n, 5), np.float32)}
    motions = train_diffusion.Motions(None, "cpu", torch.float32, True, None, torch.zeros(2, 70, 1),
                                      torch.ones(2, 70, 1))
    motions.items = [item]
    made = [motions.example(np.random.default_rng(k), (20, 30)) for k in range(40)]
    seen = {m["reference"].mean().item() for m in made}
    assert seen == {0} if told else len(seen) > 10
    begun = np.mean([m["motion"][0].mean() == 0 for m in made])
    assert .25 < begun < .75 if told else begun < .25
    if told:
        assert all(torch.equal(m["since"], m["motion"].mean((1, 2, 3)).long()) for m in made)


def test_instructions_take_the_speechs_place():
    """Each frame has the vector of the instruction in force, and since when in sinusoids: the same
    instruction at the same age looks the same, whatever comes before."""
    clip = data.toy_text(1, seconds=2.0)
    assert len(set(clip["texts"])) == 2 and clip["said"].tolist() == [0] * 25 + [1] * 25
    assert clip["since"].tolist() == [*range(25), *range(25)]
    vectors = torch.randn(1, 2, 8)
    said, since = (torch.tensor(clip[k])[None] for k in ("said", "since"))
    made = diffusion.in_force(vectors, said, since)[0]
    angle = torch.tensor([1.0, .1, .01, .001]) * 7
    for frame, which in ((7, 0), (32, 1)):
        torch.testing.assert_close(
            made[frame], vectors[0, which] + torch.cat([angle.sin(), angle.cos()]))
    old, older = diffusion.in_force(vectors, *torch.tensor([[[1, 1]], [[50, 5000]]]))[0]
    torch.testing.assert_close(old, older)
