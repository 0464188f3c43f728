"""`ldm.parity`: right nets give no alarm, and each of many broken ones is caught, at the layer and with the cause."""

import re
from copy import deepcopy

import pytest
import torch
from family import MODELS
from parity import diffusers_unet, diffusers_vae, randomise, rewrite, text_prefix, transformers_text, twin
from safetensors.torch import load_file, save_file
from torch import nn

import ldm.attention
import ldm.clip
import ldm.unet
import ldm.vae
from ldm import checkpoint, convolutions, kernels, parity
from ldm.clip import text_encoder
from ldm.parity.difference import laid_out, measure
from ldm.unet import blocks, transformer
from ldm.unet import unet as unet_module
from ldm.vae import blocks as vae_blocks
from ldm.vae import vae as vae_module

SD1, XL = MODELS["SD 1"], MODELS["SDXL"]
CLASSES = {"unet": (ldm.unet, "UNet"), "vae": (ldm.vae, "VAE"), "text_encoder": (ldm.clip, "TextEncoder")}


def theirs(part, model=SD1):
    config = getattr(model, part)
    make = {"unet": diffusers_unet, "vae": diffusers_vae}.get(part, transformers_text)
    return randomise(make(config))


def ours(part, reference, model=SD1):
    """On the reference's weights; by the classes as they are now, which a test may have rewritten."""
    module, name = CLASSES[part.removesuffix("_2")]
    prefix = text_prefix(reference) if part.startswith("text") else ""
    return twin(getattr(module, name), getattr(model, part), reference, prefix)


def inputs(part, method=None, dtype=torch.float32):
    torch.manual_seed(1)
    if part == "unet":
        return torch.randn(2, 4, 8, 8).to(dtype), torch.tensor([3.25, 700.5]), torch.randn(2, 7, 24).to(dtype)
    if part == "vae":
        return (torch.randn(1, 3, 16, 12) if method == "encode" else torch.randn(1, 4, 8, 6)).to(dtype)
    ids = torch.randint(1, 500, (2, 12))
    ids[:, -1] = 519
    return ids


@pytest.fixture
def file(tmp_path):
    return tmp_path / "recording.safetensors"


RUNS = [("unet", None), ("vae", "encode"), ("vae", "decode"), ("text_encoder", None)]
OUTPUTS = {("unet", None): 159, ("vae", "encode"): 38, ("vae", "decode"): 48, ("text_encoder", None): 37}


# Right nets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True], ids=["ours checked", "ours recorded"])
@pytest.mark.parametrize(("part", "method"), RUNS)
def test_no_alarm(part, method, turned, dtype, file):
    reference = theirs(part)
    pair = [reference.to(dtype), ours(part, reference)]
    recorded, checked = pair[::-1] if turned else pair
    parity.record(recorded, inputs(part, method, dtype), file, method)
    report = parity.check(checked, file)
    assert not report.faults
    assert sum(layer.own is not None for layer in report.layers) == OUTPUTS[part, method]
    if dtype == torch.float32:
        assert all(layer.whole.relative <= 1e-5 for layer in report.layers if layer.whole)


def test_sdxl_with_inputs_of_its_own(file):
    """diffusers is given the parts of what ours is given whole."""
    reference = randomise(diffusers_unet(XL.unet, 256))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3.25, 700.5]), torch.randn(2, 7, 56)
    pooled, sizes = torch.randn(2, 32), torch.tensor([[64.0, 48, 0, 3, 64, 64]] * 2)
    condition = {"text_embeds": pooled, "time_ids": sizes}
    given = {"sample": x, "timestep": t, "encoder_hidden_states": context, "added_cond_kwargs": condition}
    parity.record(reference, given, file)
    assert not parity.check(reference, file).faults
    report = parity.check(ours("unet", reference, XL), file, (x, t, context, blocks.vector_embedding(pooled, sizes)))
    assert not report.faults
    assert {"add_embedding.linear_1", "conv_out"} <= {layer.key for layer in report.layers}


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_the_layer_where_clip_stops_is_what_tells_sdxl_apart(part, file):
    """Its context is of the layer before the last, which transformers does not return by itself."""
    reference = theirs(part, XL)
    parity.record(reference, inputs(part), file)
    report = parity.check(ours(part, reference, XL), file)
    if part == "text_encoder":
        (fault,) = report.faults
        assert fault.culprit == ""
        assert (
            "recording text_model.final_layer_norm as it is; here text_model.encoder.layers.1 as it is" in fault.cause
        )
    else:  # its tensors are returned in another order, and not compared
        assert not report.faults and "text_projection" in {layer.key for layer in report.layers}


# Figures on paper


class Norm(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.norm = nn.LayerNorm(2, eps)
        self.twice = nn.Linear(2, 2)
        self.twice.weight.data, self.twice.bias.data = 2 * torch.eye(2), torch.zeros(2)

    def forward(self, x):
        return self.twice(self.norm(x))


def test_by_hand(file):
    """Of (1, -1), of variance 1, LayerNorm makes 1 / sqrt(1 + eps): 1/2 with eps 3, and 1 with eps 0."""
    parity.record(Norm(3.0).eval(), torch.tensor([[1.0, -1.0]]), file)
    report = parity.check(Norm(0.0).eval(), file)
    norm, twice, result = report.layers
    assert [layer.key for layer in report.layers] == ["norm", "twice", ""]
    assert norm.given == twice.given == twice.own == result.own == (0.0, 0.0, 0.0, True)
    assert norm.whole == norm.own == (0.5, 1.0, 2.0**23, False)  # at 1/2, one ulp is 2^-24
    assert twice.whole == result.whole == (1.0, 1.0, 2.0**23, False)
    (fault,) = report.faults
    assert (fault.culprit, fault.what) == ("norm", "what it makes of the recorded input is off")
    assert fault.cause.startswith("in the recording 0.5 times as much; here LayerNorm((2,), eps=0.0, ")


def test_the_report_is_a_line_a_layer(file):
    parity.record(Norm(1e-5).eval(), torch.randn(3, 2), file)
    header, norm, twice, result, verdict = str(parity.check(Norm(1e-3).eval(), file)).splitlines()
    assert header.split() == ["layer", "class", "max", "abs", "relative", "ulp", "given", "own"]
    assert norm.startswith("norm ") and norm.endswith("<- what it makes of the recorded input is off")
    assert twice.split()[:2] == ["twice", "Linear"] and twice.split()[-2:] == ["0", "0"]
    assert result.split()[:4] == ["what", "it", "returns", "Norm"]
    assert (
        verdict.startswith("first to diverge: norm: ")
        and "recording eps 1e-05; here LayerNorm((2,), eps=0.001" in verdict
    )
    last = str(parity.check(Norm(1e-5).eval(), file)).splitlines()[-1]
    assert last == "all 3 outputs that can be compared agree"


def test_differences():
    one = torch.tensor([1.0])
    assert measure(one, one + 2**-23) == (2**-23, pytest.approx(2**-23, rel=1e-6), 1.0, True)
    assert measure(one.bfloat16(), one + 2**-5)[2:] == (4.0, True)  # the coarser of the two
    assert measure(one.bfloat16(), one + 2**-4)[2:] == (8.0, False)
    assert measure(one + 17 * 2**-23, one)[2:] == (17.0, False)
    assert measure(one + 17 * 2**-23, one, terms=1).ok and not measure(one + 18 * 2**-23, one, terms=1).ok
    tokens = torch.ones(1, 4, 1)  # attention may sum over four
    assert measure(tokens + 18 * 2**-23, tokens).ok and not measure(tokens + 18 * 2**-23, tokens, terms=0).ok
    nan = torch.tensor([float("nan"), 1.0])
    assert measure(nan, nan.clone()) == (0.0, 0.0, 0.0, True)
    assert measure(nan, torch.ones(2)).ulp == float("inf")
    assert not measure(torch.ones(2), torch.ones(3)).ok
    assert measure(torch.tensor([3]), torch.tensor([3])).ok and not measure(torch.tensor([3]), torch.tensor([4])).ok


def test_layouts():
    x = torch.randn(2, 3, 4, 5)
    rows = x.flatten(2).transpose(1, 2)
    assert torch.equal(laid_out(x, torch.Size((2, 3, 20))), x.flatten(2))
    assert torch.equal(laid_out(x, torch.Size((2, 20, 3))), rows)
    assert torch.equal(laid_out(rows, x.shape), x) and torch.equal(laid_out(x.flatten(2), x.shape), x)
    assert laid_out(x, torch.Size((2, 4, 3, 5))) is None and laid_out(x, torch.Size((6, 20))) is None


# Ours, broken, against the recordings of diffusers and transformers

GEGLU = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CLIP = "text_model.encoder.layers.0"
BROKEN = {  # part and method, what is rewritten, the culprit, the cause
    "eps of a resnet's norm": (
        ("unet", None),
        (blocks, {"GroupNorm(groups, inp, eps=1e-5)": "GroupNorm(groups, inp, eps=1e-6)"}),
        "down_blocks.0.resnets.0.norm1",
        "eps 1e-05; here GroupNorm(8, 16, eps=1e-06, ",
    ),
    "eps of the transformer's norm": (
        ("unet", None),
        (transformer, {"eps=1e-6": "eps=1e-5"}),
        "down_blocks.0.attentions.0.norm",
        "eps 1e-06; here GroupNorm(8, 16, eps=1e-05, ",
    ),
    "eps of a LayerNorm": (
        ("unet", None),
        (transformer, {"self.norm2 = nn.LayerNorm(width)": "self.norm2 = nn.LayerNorm(width, eps=1e-6)"}),
        "down_blocks.0.attentions.0.transformer_blocks.0.norm2",
        "eps 1e-05; here LayerNorm((16,), eps=1e-06, ",
    ),
    "eps of the VAE's norms": (
        ("vae", "decode"),
        (vae_blocks, {"GroupNorm(groups, channels, eps=1e-6)": "GroupNorm(groups, channels, eps=1e-4)"}),
        "decoder.mid_block.attentions.0.group_norm",
        "eps 1e-06",
    ),
    "the UNet pads as the VAE does": (
        ("unet", None),
        (
            blocks,
            {
                "3, stride=2, padding=1)": "3, stride=2)",
                "return self.conv(x)  #": "return self.conv(F.pad(x, (0, 1, 0, 1)))  #",
            },
        ),
        "down_blocks.0.downsamplers.0",
        "down_blocks.0.attentions.0 as it is; here down_blocks.0.attentions.0 padded by (0, 1, 0, 1)",
    ),
    "the VAE pads on all sides": (
        ("vae", "encode"),
        (vae_blocks, {"(0, 1, 0, 1)": "(1, 1, 1, 1)"}),
        "encoder.down_blocks.0.downsamplers.0",
        "padded by (0, 1, 0, 1); here encoder.down_blocks.0.resnets.0 padded by (1, 1, 1, 1)",
    ),
    "the VAE enlarges smoothly": (
        ("vae", "decode"),
        (convolutions, {'mode="nearest"': 'mode="bilinear"'}),
        "decoder.up_blocks.0.upsamplers.0",
        "enlarged by nearest; here decoder.up_blocks.0.resnets.1 enlarged by bilinear",
    ),
    "halves of GEGLU": (
        ("unet", None),
        (kernels, {"a, b = proj(x)": "b, a = proj(x)"}),
        GEGLU,
        "a gelu(b), [a, b] = proj; here b gelu(a), [a, b] = proj",
    ),
    "gelu by tanh": (
        ("unet", None),
        (kernels, {"F.gelu(b)": "F.gelu(b, approximate='tanh')"}),
        GEGLU,
        "a gelu(b), [a, b] = proj; here a gelu(b) by tanh, [a, b] = proj",
    ),
    "sine before cosine": (
        ("unet", None),
        (blocks, {"[angle.cos(), angle.sin()]": "[angle.sin(), angle.cos()]"}),
        "",
        "[cos, sin] of the model's input, frequencies 10000^(-i/half); here [sin, cos] of the model's input",
    ),
    "the last frequency": (
        ("unet", None),
        (blocks, {"device=t.device) / half": "device=t.device) / (half - 1)"}),
        "",
        "10000^(-i/half); here [cos, sin] of the model's input, frequencies 10000^(-i/(half - 1))",
    ),
    "t cut to whole numbers": (
        ("unet", None),
        (blocks, {"t.float()": "t.long().float()"}),
        "",
        "of the model's input, frequencies 10000^(-i/half); here [cos, sin] of the model's input in whole numbers",
    ),
    "another activation in the time embedding": (
        ("unet", None),
        (blocks, {"F.silu(self.linear_1(x))": "F.relu(self.linear_1(x))"}),
        "time_embedding",
        "silu(linear_1); here relu(linear_1)",
    ),
    "no activation before a resnet's time": (
        ("unet", None),
        (blocks, {"F.silu(temb)": "temb"}),
        "down_blocks.0.resnets.0",
        "silu(time_embedding.linear_2); here time_embedding.linear_2 as it is",
    ),
    "no time in a resnet": (
        ("unet", None),
        (blocks, {"h = h + self.time_emb_proj": "self.time_emb_proj"}),
        "down_blocks.0.resnets.0",
        "time_emb_proj is added",
    ),
    "no residual": (
        ("unet", None),
        (blocks, {"added(self.conv_shortcut(x), self.conv2, ": "self.conv2("}),
        "down_blocks.0.resnets.0",
        "conv_in is added",
    ),
    "a result halved": (
        ("vae", "decode"),
        (vae_blocks, {"h, self.conv_shortcut, x)": "h, self.conv_shortcut, x) / 2"}),
        "decoder.mid_block.resnets.0",
        "2 times as much",
    ),
    "skip connections joined the other way": (
        ("unet", None),
        (unet_module, {"torch.cat([x, skips.pop()], dim=1)": "torch.cat([skips.pop(), x], dim=1)"}),
        "up_blocks.0",
        "its first 32 channels come last",
    ),
    "attention without its scale": (
        ("unet", None),
        (kernels, {"attn_mask=mask)": "attn_mask=mask, scale=1.0)"}),
        ATTENTION,
        "attention of 4 heads, scale 1/sqrt(d), no mask; here attention of 4 heads, scale 1, no mask",
    ),
    "heads split inside out": (
        ("unet", None),
        (ldm.attention, {"b n (h d) -> b h n d": "b n (d h) -> b h n d"}),
        ATTENTION,
        "attention of 4 heads, scale 1/sqrt(d), no mask; here attention of 4 heads innermost, scale 1/sqrt(d), no mask",
    ),
    "no causal mask": (
        ("text_encoder", None),
        (text_encoder, {".tril()": ""}),
        f"{CLIP}.self_attn",
        "attention of 4 heads, scale 1/sqrt(d), a causal mask; here attention of 4 heads, scale 1/sqrt(d), no mask",
    ),
    "gelu for quick_gelu": (
        ("text_encoder", None),
        (text_encoder, {'"quick_gelu": quick_gelu': '"quick_gelu": F.gelu'}),
        f"{CLIP}.mlp",
        "quick_gelu(fc1); here gelu(fc1)",
    ),
    "variance for standard deviation": (
        ("vae", "encode"),
        (vae_module, {"(0.5 * logvar": "(1.0 * logvar"}),
        "",
        None,
    ),
    "a mask that shows the next token": (
        ("text_encoder", None),
        (text_encoder, {".tril()": ".tril(1)"}),
        f"{CLIP}.self_attn",
        "attention of 4 heads, scale 1/sqrt(d), a causal mask",  # and what is done here has no name
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_ours_broken(name, file, monkeypatch):
    (part, method), edits, culprit, cause = BROKEN[name]
    reference = theirs(part)
    parity.record(reference, inputs(part, method), file, method)
    rewrite(monkeypatch, *edits)
    first = parity.check(ours(part, reference), file).faults[0]
    assert first.culprit == culprit
    assert cause in first.cause if cause else first.cause == ""


# Theirs, broken, against our recordings


def transpose(net):
    weight = net.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    weight.data = weight.data.T.clone()


def exchange(net):
    attention = net.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attention.to_k, attention.to_v = attention.to_v, attention.to_k


def round_one(net):
    net.conv_in.weight.data = net.conv_in.weight.data.bfloat16().float()
    net.conv_in.bias.data = net.conv_in.bias.data.bfloat16().float()


def set_to(path, **values):
    def change(net):
        for name, value in values.items():
            setattr(net.get_submodule(path), name, value)

    return change


def pad_symmetrically(net):
    down = net.encoder.down_blocks[0].downsamplers[0]
    down.padding, down.conv.padding = 1, (1, 1)


def turn_kernel(net):
    net.conv_out.weight.data = net.conv_out.weight.data.flip(2, 3)


THEIRS = {
    "a weight transposed": (
        ("unet", None),
        transpose,
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "the weight transposed; here Linear(in_features=32, ",
    ),
    "keys for values": (
        ("unet", None),
        exchange,
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "the weights of down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
    ),
    "no bias": (
        ("unet", None),
        set_to("down_blocks.0.resnets.0.conv1", bias=None),
        "down_blocks.0.resnets.0.conv1",
        "another bias",
    ),
    "weights from bfloat16": (("unet", None), round_one, "conv_in", "weights that were not rounded to bfloat16"),
    "half the heads": (
        ("unet", None),
        set_to(ATTENTION, heads=2),
        ATTENTION,
        "attention of 4 heads, scale 1/sqrt(d), no mask; here attention of 2 heads, scale 1/sqrt(d), no mask",
    ),
    "half the groups": (
        ("unet", None),
        set_to("down_blocks.0.resnets.0.norm2", num_groups=4),
        "down_blocks.0.resnets.0.norm2",
        "8 groups, eps 1e-05; here GroupNorm(4, ",
    ),
    "another activation": (
        ("unet", None),
        set_to("down_blocks.0.resnets.0", nonlinearity=nn.GELU()),
        "down_blocks.0.resnets.0",
        "silu(norm1); here gelu(norm1)",
    ),
    "a norm left out": (
        ("unet", None),
        set_to("down_blocks.0.attentions.0", norm=nn.Identity()),
        "down_blocks.0.attentions.0.norm",
        "a GroupNorm, not a Identity",
    ),
    "a kernel turned": (("unet", None), turn_kernel, "conv_out", "the kernel turned half round"),
    "circular padding": (
        ("unet", None),
        set_to("conv_in", padding_mode="circular", _reversed_padding_repeated_twice=[1, 1, 1, 1]),
        "conv_in",
        "padding_mode constant",
    ),
    "the encoder pads on all sides": (
        ("vae", "encode"),
        pad_symmetrically,
        "encoder.down_blocks.0.downsamplers.0",
        "padded by (0, 1, 0, 1); here encoder.down_blocks.0.resnets.0 as it is",
    ),
    "eps of CLIP's last norm": (
        ("text_encoder", None),
        set_to("final_layer_norm", eps=1e-3),
        "final_layer_norm",
        "eps 1e-05; here LayerNorm((24,), eps=0.001",
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_broken(name, file):
    (part, method), edit, culprit, cause = THEIRS[name]
    reference = theirs(part)
    parity.record(deepcopy(ours(part, reference)), inputs(part, method), file, method)
    edit(reference)
    first = parity.check(reference, file).faults[0]
    assert first.culprit == culprit
    assert cause in first.cause


# What a report says of more than one fault, and of none


def test_only_the_guilty_layer_is_named(file):
    """Every output behind it is off, too, and its own is not called a fault."""
    reference = theirs("unet")
    parity.record(reference, inputs("unet"), file)
    net = ours("unet", reference)
    net.conv_in.padding_mode = "reflect"
    net.conv_in._reversed_padding_repeated_twice = [1, 1, 1, 1]
    report = parity.check(net, file)
    assert [fault.culprit for fault in report.faults] == ["conv_in"]
    alone = re.compile("time_emb|attn2.to_[kv]|conv_in")  # they see the timestep or the text, and not the picture
    behind = [layer for layer in report.layers if layer.own and not alone.search(layer.key)]
    assert len(behind) == 139 and all(layer.own.ok and not layer.whole.ok for layer in behind)


@pytest.mark.parametrize("name", ["sine before cosine", "skip connections joined the other way"])
def test_a_module_that_is_misled_is_not_blamed(name, file, monkeypatch):
    """The time embedding gets sine and cosine from the UNet, a resnet what its block has joined."""
    reference = theirs("unet")
    parity.record(reference, inputs("unet"), file)
    rewrite(monkeypatch, *BROKEN[name][1])
    culprits = [fault.culprit for fault in parity.check(ours("unet", reference), file).faults]
    assert {*culprits} == ({""} if name == "sine before cosine" else {"up_blocks.0", "up_blocks.1"})
    assert len(culprits) == (1 if name == "sine before cosine" else 8)


def test_what_a_residual_carries_on_is_not_blamed_on_it(file, monkeypatch):
    """The middle's first resnet adds to its wrong input what is right."""
    reference = theirs("unet")
    parity.record(reference, inputs("unet"), file)
    rewrite(monkeypatch, unet_module, {"self.mid_block(skips[-1], temb": "self.mid_block(2 * skips[-1], temb"})
    (fault,) = parity.check(ours("unet", reference), file).faults
    assert (fault.culprit, fault.what) == ("", "what comes to mid_block.resnets.0.norm1 is off")
    assert fault.cause.startswith("in the recording down_blocks.1.resnets.0 as it is")


def test_two_faults_are_told_apart(file):
    reference = theirs("unet")
    parity.record(reference, inputs("unet"), file)
    set_to("down_blocks.0.resnets.0.norm1", eps=1e-2)(reference)
    turn_kernel(reference)
    first, second = parity.check(reference, file).faults
    assert (first.culprit, second.culprit) == ("down_blocks.0.resnets.0.norm1", "conv_out")
    assert "eps 1e-05" in first.cause and "turned half round" in second.cause


def test_what_cannot_be_told_is_unknown(file):
    reference = theirs("unet")
    parity.record(reference, inputs("unet"), file)
    reference.conv_in.weight.data[0, 0, 0, 0] += 0.1
    (fault,) = parity.check(reference, file).faults
    assert str(fault) == "conv_in: what it makes of the recorded input is off; likely cause: unknown"


def test_alternatives_that_give_the_same_are_all_named(file):
    """Where the input is loud, no smaller eps than the recorded one gives a result that is two ulp off."""
    parity.record(Norm(1e-6).eval(), torch.tensor([[0.4, 4.0], [0.1, 7.0]]), file)
    (fault,) = parity.check(Norm(1e-1).eval(), file).faults
    assert "eps 1e-06 or eps 1e-12 or eps 1e-08" in fault.cause


# Names


class Official(nn.Module):
    """A net of diffusers or transformers, with its layers under the names of another layout."""

    def __init__(self, net, name_of):
        super().__init__()
        object.__setattr__(self, "net", net)  # not registered
        for name, module in net.named_modules():
            weighs = "weight" in dict(module.named_parameters(recurse=False))
            if weighs and (theirs := name_of(f"{name}.weight")).endswith(".weight"):
                *path, last = theirs.split(".")[:-1]
                place = self
                for step in path:
                    if not hasattr(place, step):
                        place.add_module(step, nn.Module())
                    place = place.get_submodule(step)
                place.add_module(last, module)

    def forward(self, *args):
        return self.net(*args)

    def encode(self, *args):
        return self.net.encode(*args)


UNET = "model.diffusion_model."  # which a file's names have and the official net's own have not
LAYOUTS = {  # part, method, the layout's number in the key table, a layer's name in it, and how many have names there
    "official UNet": ("unet", None, 0, "input_blocks.1.0.in_layers.0", 117),
    "official VAE": ("vae", "encode", 0, "first_stage_model.encoder.mid.attn_1.q", 28),
    "VAE of old diffusers": ("vae", "encode", 3, "encoder.mid_block.attentions.0.query", 28),
    "CLIP in an official file": (
        "text_encoder",
        None,
        0,
        "cond_stage_model.transformer.text_model.final_layer_norm",
        27,
    ),
    "OpenCLIP": ("text_encoder", None, 4, "cond_stage_model.model.ln_final", 18),
}


@pytest.mark.parametrize("turned", [False, True], ids=["ours checked", "ours recorded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_names(layout, turned, file):
    part, method, number, layer, count = LAYOUTS[layout]
    reference, net = theirs(part), ours(part, theirs(part))
    prefix = text_prefix(reference) if part.startswith("text") else ""
    spellings = checkpoint.NETS[part][1]
    other = Official(reference, lambda name: spellings(net.config, prefix + name)[number].removeprefix(UNET)).eval()
    assert other.get_submodule(layer)
    recorded, checked = (net, other) if turned else (other, net)
    parity.record(recorded, inputs(part, method), file, method)
    report = parity.check(checked, file)
    assert not report.faults
    assert sum(layer.own is not None for layer in report.layers) == count
    at = "final_layer_norm" if part == "text_encoder" else "encoder.conv_norm_out" if part == "vae" else "conv_norm_out"
    set_to(at if part != "text_encoder" else prefix + at, eps=0.1)(net)
    if not turned:
        (fault,) = parity.check(net, file).faults
        assert fault.culprit.endswith(at) and "in the recording eps" in fault.cause


# Files and errors


def test_the_file_has_each_tensor_once_under_the_name_of_its_layer(file):
    net, outputs = ours("unet", theirs("unet")), {}
    with torch.no_grad(), net.conv_in.register_forward_hook(lambda m, x, y: outputs.update(conv_in=y)):
        parity.record(net, inputs("unet"), file)
    tensors = load_file(file)
    assert torch.equal(tensors["conv_in.0"], outputs["conv_in"])
    assert "down_blocks.0.resnets.0.norm1 given.0" not in tensors  # which is what conv_in puts out
    assert len({(tuple(t.shape), t.numpy().tobytes()) for t in tensors.values()}) == len(tensors)


def test_the_net_is_left_as_it_was(file):
    net = ours("unet", theirs("unet"))
    with torch.no_grad():
        before = net(*inputs("unet"))
        parity.record(net, inputs("unet"), file)
        parity.check(net, file)
        with pytest.raises(RuntimeError):
            parity.record(net, (torch.zeros(1, 3, 8, 8), 0, torch.zeros(1, 7, 24)), file)
        assert torch.equal(net(*inputs("unet")), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not parity.check(net, file).faults  # the recording is still the first one


def test_a_layer_that_writes_to_its_input(file):
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2)).eval()
    parity.record(net, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), file)
    tensors = load_file(file)
    assert (tensors["0.0"] < 0).any() and (tensors["1.0"] == tensors["0.0"].relu()).all()
    assert not parity.check(net, file).faults


def test_a_layer_called_twice(file):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, factor):
            return self.layer(factor * self.layer(x))

    net = Twice().eval()
    parity.record(net, {"x": torch.randn(1, 2), "factor": 2.0}, file)
    assert [layer.key for layer in parity.check(net, file).layers] == ["layer", "layer#2", ""]
    (fault,) = parity.check(net, file, (Recorded(file, "argument 0.0"), 3.0)).faults
    assert (fault.culprit, fault.what) == (
        "",
        "what comes to layer#2 is off",
    ) and "0.666667 times as much" in fault.cause


def Recorded(file, name):
    return load_file(file)[name]


def test_refused(file):
    net = Norm(0.0)
    with pytest.raises(ValueError, match=r"Norm is in training mode, .* call its \.eval\(\)"):
        parity.record(net, torch.zeros(1, 2), file)
    net.eval()
    with pytest.raises(ValueError, match="inputs: int, give a tensor, a tuple, or a dict"):
        parity.record(net, 3, file)
    with pytest.raises(ValueError, match="inputs: object cannot be kept, give tensors, numbers and texts"):
        parity.record(net, (object(),), file)
    with pytest.raises(ValueError, match="nowhere does not exist, make it first"):
        parity.record(net, torch.zeros(1, 2), file.parent / "nowhere" / "file")
    assert not [*file.parent.iterdir()]
    save_file({"weight": torch.ones(2)}, file)
    content = file.read_bytes()
    with pytest.raises(ValueError, match="exists and is no recording: give another name"):
        parity.record(net, torch.zeros(1, 2), file)
    with pytest.raises(ValueError, match=r"is no recording: make one with ldm\.parity\.record\(model, inputs, file\)"):
        parity.check(net, file)
    assert file.read_bytes() == content
    other = file.with_name("other")
    parity.record(net, torch.zeros(1, 2), other)
    for act in (lambda: parity.record(object(), torch.zeros(1, 2), other), lambda: parity.check(object(), other)):
        with pytest.raises(ValueError, match=r"object is no torch\.nn\.Module: give a net"):
            act()
    with pytest.raises(
        ValueError, match=r"has no module of this model's names: it has \['norm', 'twice'\], the model \['0'\]"
    ):
        parity.check(nn.Sequential(nn.Linear(2, 2)).eval(), other)


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_another_width(file):
    """The layer is named although the net cannot be run to its end on what was recorded."""
    torch.manual_seed(0)
    reference, port = Wide(16).eval(), Wide(16).eval()
    port.load_state_dict(reference.state_dict())
    port.b = nn.Linear(16, 8)
    parity.record(reference, torch.randn(2, 3, 16), file)
    report = parity.check(port.eval(), file)
    assert report.faults[0].culprit == "b" and "(2, 3, 16), here (2, 3, 8)" in report.faults[0].cause
    assert [layer.key for layer in report.layers] == ["a", "b", "c", ""] and not report.missing
    assert len(report.faults) == 1 and "the model could not be run to its end: " in str(report)


def test_a_layer_and_a_net_without_weights(file):
    layer, x = nn.Linear(16, 16).eval(), torch.randn(2, 16)
    parity.record(layer, x, file)
    assert not parity.check(layer, file).faults
    assert parity.check(nn.Linear(16, 16).eval(), file).faults
    parity.record(nn.Sequential(nn.SiLU()).eval(), x, file)
    assert not parity.check(nn.Sequential(nn.SiLU()).eval(), file).faults
    (fault,) = parity.check(nn.Sequential(nn.ReLU()).eval(), file).faults
    assert fault.culprit == "0" and "silu" in fault.cause
