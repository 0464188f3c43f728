"""LoRA beside diffusers with PEFT, on the very same files, and against the formulas in float64."""

import json
import math
from contextlib import contextmanager
from itertools import permutations

import family
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from synthetic import KEYS
from torch import nn

import ldm
from ldm import checkpoint, models
from ldm.lora import Change, spelled, spellings, split
from ldm.source import CheckpointError
from ldm.unet import vector_embedding
from ldm.unet.keys import official_name

SD1 = family.SD1
PARTS = ("unet", "text_encoder", "text_encoder_2")
ALL = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
ALL += ["conv_in", "time_emb_proj", "linear_1", "conv_shortcut", "conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return made("SD 1", tmp_path_factory)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return made("SDXL", tmp_path_factory)


def made(kind, tmp_path_factory):
    reference = family.xl(family.XL) if kind == "SDXL" else family.sd(SD1)
    if kind == "SD 1":
        object.__delattr__(reference.text_encoder, "text_model")  # a stand-in, by which diffusers' loader would go
    reference.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    return folder, reference


@pytest.fixture
def pipe(sd1):
    return ldm.Pipeline.from_pretrained(sd1[0])


def nets(pipe):
    return {part: getattr(pipe, part) for part in PARTS if getattr(pipe, part) is not None}


def modules(pipe):
    for part, net in nets(pipe).items():
        for path, module in net.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield part, path, module.weight


def weights(pipe):
    return {(part, name): p for part, net in nets(pipe).items() for name, p in net.named_parameters()}


def kohya(part, path, config=None, te="te1"):
    if part == "unet" and config is not None:
        path = official_name(config, f"{path}.weight").removesuffix(".weight")
    return {"unet": "lora_unet_", "text_encoder": f"lora_{te}_", "text_encoder_2": "lora_te2_"}[part] + path.replace(
        ".", "_"
    )


def up_down(weight, rank=3):
    out, into, *kernel = weight.shape
    up, down = 0.15 * torch.randn(out, rank, *[1] * len(kernel)), 0.15 * torch.randn(rank, into, *kernel)
    return up, down


def plain(pipe, name, up="lora_up.weight", down="lora_down.weight", alpha=2.0, wanted=lambda part, path: True):
    """A file for all weights: `name(part, path)` is what a module is called in it."""
    tensors = {}
    for part, path, weight in modules(pipe):
        if wanted(part, path):
            key = name(part, path)
            tensors[f"{key}.{up}"], tensors[f"{key}.{down}"] = up_down(weight)
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def saved(tensors, path, metadata=None):
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


@contextmanager
def loaded(reference, file, scale=1.0):
    """diffusers' pipeline with the LoRA."""
    reference.load_lora_weights(file.parent, weight_name=file.name, adapter_name="it")
    if scale != 1:
        reference.set_adapters("it", scale)
    try:
        yield reference
    finally:
        reference.unload_lora_weights()


@torch.no_grad()
def assert_parity(pipe, reference, parts=(*PARTS, "pooled")):
    """The nets' outputs."""
    torch.manual_seed(3)
    ids = torch.randint(0, 500, (2, 77))
    ids[:, 40] = 519
    pairs = {}
    for part in [part for part in nets(pipe) if part != "unet"]:
        ours, theirs = getattr(pipe, part)(ids), getattr(reference, part)(ids, output_hidden_states=True)
        skips = getattr(pipe, part).config.skip
        pairs[part] = ours.context, theirs.hidden_states[-2] if skips else theirs.last_hidden_state
        if "text_embeds" in theirs:
            pairs["pooled"] = ours.pooled, theirs.text_embeds
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, pipe.unet.config.context_width)
    vector, condition = None, {}
    if pipe.unet.config.vector_width is not None:
        pooled, sizes = torch.randn(2, 32), 60 * torch.rand(2, 6)
        vector, condition = vector_embedding(pooled, sizes), {"text_embeds": pooled, "time_ids": sizes}
    theirs = reference.unet(x, 500, encoder_hidden_states=context, added_cond_kwargs=condition).sample
    pairs["unet"] = pipe.unet(x, 500, context, vector), theirs
    for part in pairs.keys() & set(parts):
        a, b = pairs[part]
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), part


def assert_same_run(pipe, reference):
    common = {"prompt": "a cat", "negative_prompt": "the red", "steps": 3}
    sampler = "ddim" if pipe.text_encoder_2 is None else "euler"
    family.assert_close(family.ours(pipe, sampler=sampler, **common), family.theirs(reference, **common))


# Beside diffusers


class TestKohya:
    def test_sd1(self, sd1, pipe, tmp_path):
        """All layers, convolutions too."""
        file = saved(plain(pipe, lambda part, path: kohya(part, path, te="te")), tmp_path / "lora.safetensors")
        lora = pipe.load_lora(file)
        assert len(lora.changes) == 101
        with loaded(sd1[1], file) as reference:
            assert_parity(pipe, reference)
            assert_same_run(pipe, reference)
            reference.set_adapters("it", 0.7)
            lora.scale = 0.7
            assert_parity(pipe, reference)

    @pytest.mark.parametrize("names", ["diffusers", "official"])
    def test_sdxl(self, xl, names, tmp_path):
        """Both text encoders. (diffusers itself cannot read diffusers' names of the add_embedding.)"""
        pipe = ldm.Pipeline.from_pretrained(xl[0])
        config = pipe.unet.config if names == "official" else None
        wanted = lambda part, path: "add_embedding" not in path or names == "official"  # noqa: E731
        tensors = plain(pipe, lambda part, path: kohya(part, path, config), wanted=wanted)
        file = saved(tensors, tmp_path / "lora.safetensors")
        assert len(pipe.load_lora(file).changes) == (162 if names == "official" else 160)
        with loaded(xl[1], file) as reference:
            assert_parity(pipe, reference)
            if names == "official":
                assert_same_run(pipe, reference)


def attention(part, path):
    return path.split(".")[-1] in ("to_q", "to_k", "to_v", "0", "q_proj", "k_proj", "v_proj", "out_proj") and (
        "attn" in path
    )


def old(part, path):
    """diffusers' names before 2023's summer."""
    start, _, last = path.removesuffix(".0").rpartition(".")
    return f"{part}.{start}.processor.{last}_lora" if part == "unet" else f"{part}.{start}.to_{last.split('_')[0]}_lora"


def short(part, path):
    """As transformers 5 has it, which has kept `text_model` where there is a projection."""
    return f"{part}.{path.removeprefix('text_model.') if part == 'text_encoder' else path}"


NAMES = {  # what follows, which layers, and their names
    "PEFT": ("lora_B.weight", "lora_A.weight", lambda part, path: True, "{}.{}".format),
    "PEFT, transformers 5": ("lora_B.weight", "lora_A.weight", lambda part, path: True, short),
    "PEFT, an adapter": ("lora_B.default.weight", "lora_A.default.weight", lambda part, path: True, "{}.{}".format),
    "diffusers": ("lora.up.weight", "lora.down.weight", lambda part, path: part == "unet", "{}.{}".format),
    "linear layer": (
        "lora_linear_layer.up.weight",
        "lora_linear_layer.down.weight",
        lambda part, path: part != "unet" and "projection" not in path,
        "{}.{}".format,
    ),
    "old": ("up.weight", "down.weight", attention, old),
}


@pytest.mark.parametrize("names", NAMES)
def test_dotted_names(xl, names, tmp_path):
    folder, reference = xl
    pipe = ldm.Pipeline.from_pretrained(folder)
    up, down, wanted, name = NAMES[names]
    tensors = plain(pipe, name, up, down, None, wanted)
    file = saved(tensors, tmp_path / "lora.safetensors")
    assert len(pipe.load_lora(file).changes) == len(tensors) // 2
    if "adapter" in names:  # which PEFT takes out before it writes
        tensors = {key.replace(".default", ""): tensor for key, tensor in tensors.items()}
        file = saved(tensors, tmp_path / "theirs.safetensors")
    with loaded(reference, file):
        assert_parity(pipe, reference)


# PEFT's configs


def adapted(reference, parts, **options):
    """Adapters with random values on the reference's nets."""
    torch.manual_seed(5)
    for part in parts:
        net = getattr(reference, part)
        net.add_adapter(LoraConfig(target_modules=ALL if part == "unet" else TEXT, **options), adapter_name="it")
        draw(net)


def draw(net):
    for name, p in net.named_parameters():
        if "lora_magnitude" in name:
            p.data.mul_(1 + 0.3 * torch.rand_like(p))
        elif "lora_" in name:
            p.data.normal_(std=0.15)


def state(reference, part):
    return get_peft_model_state_dict(getattr(reference, part), adapter_name="it")


CONFIGS = {
    "alpha": {"r": 4, "lora_alpha": 6},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"to_q": 2, "mid_block.*conv1": 3},
        "alpha_pattern": {  # the first that matches counts; files have them sorted
            "^encoder.layers.0.self_attn.k_proj": 8,
            "^mid_block.*to_k": 9,
            "attn2.to_q": 7,
            "fc1": 1.5,
            "layers.1.self_attn.q_proj": 2,
            "proj": 5,
            "to_q": 3,
        },
    },
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
}


@pytest.mark.parametrize(("model", "config"), [("sd1", "DoRA"), *(("xl", config) for config in CONFIGS)])
def test_what_diffusers_writes(model, config, request, tmp_path):
    """With alpha in the file's header."""
    folder, reference = request.getfixturevalue(model)
    pipe = ldm.Pipeline.from_pretrained(folder)
    adapted(reference, nets(pipe), **CONFIGS[config])
    layers, metadata = {}, {}
    for part in nets(pipe):
        layers[f"{part}_lora_layers"] = state(reference, part)
        metadata[f"{part}_lora_adapter_metadata"] = getattr(reference, part).peft_config["it"].to_dict()
    try:
        reference.save_lora_weights(tmp_path, **layers, **metadata)
        lora = pipe.load_lora(tmp_path / "pytorch_lora_weights.safetensors")
        assert len(lora.changes) > 90
        assert_parity(pipe, reference)
    finally:
        reference.unload_lora_weights()
    with loaded(reference, tmp_path / "pytorch_lora_weights.safetensors"):
        # transformers writes the magnitudes of text encoders, but does not find them when it reads.
        assert_parity(pipe, reference, ["unet"] if config == "DoRA" else PARTS)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("config", ["patterns", "DoRA"])
def test_what_peft_writes(sd1, part, config, pipe, tmp_path):
    """With alpha in a file beside."""
    reference = sd1[1]
    net = getattr(reference, part)
    torch.manual_seed(5)
    wrapped = get_peft_model(net, LoraConfig(target_modules=ALL if part == "unet" else TEXT, **CONFIGS[config]))
    try:
        draw(wrapped)
        wrapped.save_pretrained(tmp_path)
        lora = pipe.load_lora(tmp_path / "adapter_model.safetensors")
        assert len(lora.changes) > 10
        assert_parity(pipe, reference)
        lora.remove()
        config = tmp_path / "adapter_config.json"
        fields = json.loads(config.read_text())
        config.write_text(json.dumps(fields | {"peft_type": "LOHA"}))
        with pytest.raises(CheckpointError, match="peft_type is 'LOHA', but this version only does 'LORA' of PEFT's"):
            pipe.load_lora(tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(CheckpointError, match=r"PEFT's own: .*adapter_config.json .*alpha"):
            pipe.load_lora(tmp_path / "adapter_model.safetensors")
    finally:
        wrapped.unload()


# The formulas, in float64 and index by index


def drawn(*shape):
    return (0.5 * torch.randn(shape)).double().float().numpy().astype(np.float64)


def lora(n, m, k, r):
    up, down = drawn(n, r), drawn(r, m, *k)
    tensors = {"lora_up.weight": up.reshape(n, r, *[1] * len(k)), "lora_down.weight": down}
    return tensors, np.einsum("nr,rm...->nm...", up, down), r


def tucker(n, m, k, r):
    up, mid, down = drawn(n, r), drawn(r, r + 1, *k), drawn(r + 1, m)
    tensors = {"lora_up.weight": up[..., None, None], "lora_mid.weight": mid, "lora_down.weight": down[..., None, None]}
    return tensors, np.einsum("no,oi...,im->nm...", up, mid, down), r + 1


def loha(n, m, k, r):
    w = [drawn(*shape) for shape in [(n, r), (r, m * math.prod(k))] * 2]
    dw = ((w[0] @ w[1]) * (w[2] @ w[3])).reshape(n, m, *k)
    return dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), w, strict=True)), dw, r


def loha_tucker(n, m, k, r):
    t1, a1, b1, t2, a2, b2 = (drawn(*shape) for shape in [(r, r, *k), (r, n), (r, m)] * 2)
    one, two = (np.einsum("pq...,pn,qm->nm...", t, a, b) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))
    names = ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b")
    return dict(zip(names, (t1, a1, b1, t2, a2, b2), strict=True)), one * two, r


def kron(w1, w2):
    """Row n1 * n of 2 + n2, column m1 * m of 2 + m2, and the kernel is w2's."""
    (n1, m1), (n2, m2, *k) = w1.shape, w2.shape
    dw = np.zeros((n1 * n2, m1 * m2, *k))
    for i, j in np.ndindex(n1, m1):
        dw[i * n2 : (i + 1) * n2, j * m2 : (j + 1) * m2] = w1[i, j] * w2
    return dw


def lokr_whole(n, m, k, r):
    w1, w2 = drawn(4, 2), drawn(n // 4, m // 2, *k)
    return {"lokr_w1": w1, "lokr_w2": w2}, kron(w1, w2), None


def lokr_second(n, m, k, r):
    w1, a, b = drawn(4, 2), drawn(n // 4, r), drawn(r, m // 2 * math.prod(k))
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, kron(w1, (a @ b).reshape(n // 4, m // 2, *k)), r


def lokr_first(n, m, k, r):
    a, b, w2 = drawn(4, r), drawn(r, 2), drawn(n // 4, m // 2, *k)
    return {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2": w2}, kron(a @ b, w2), r


def lokr_both(n, m, k, r):
    """The second factor's rank counts."""
    tensors, _, _ = lokr_second(n, m, k, r)
    a, b = drawn(4, r + 2), drawn(r + 2, 2)
    w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    tensors |= {"lokr_w1_a": a, "lokr_w1_b": b}
    del tensors["lokr_w1"]
    return tensors, kron(a @ b, w2.reshape(n // 4, m // 2, *k)), r


def lokr_tucker(n, m, k, r):
    w1, t, a, b = drawn(4, 2), drawn(r, r, *k), drawn(r, n // 4), drawn(r, m // 2)
    w2 = np.einsum("pq...,pn,qm->nm...", t, a, b)
    return {"lokr_w1": w1, "lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}, kron(w1, w2), r


FORMS = [lora, tucker, loha, loha_tucker, lokr_whole, lokr_second, lokr_first, lokr_both, lokr_tucker]
LAYERS = {  # a convolution, one that is a matrix, and matrices of either net
    "conv": ("unet", "down_blocks.0.resnets.0.conv1"),
    "1x1": ("unet", "down_blocks.0.attentions.0.proj_in"),
    "linear": ("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"),
    "text": ("text_encoder", "text_model.encoder.layers.1.mlp.fc2"),
}


def one(pipe, layer):
    part, path = LAYERS[layer]
    return kohya(part, path, te="te"), getattr(pipe, part).get_submodule(path).weight


def dora(w, dw, m, axes):
    v = w + dw
    return m * v / np.sqrt((v**2).sum(axis=axes, keepdims=True)) - w


def to_file(key, tensors, path):
    return saved({f"{key}.{name}": torch.as_tensor(t, dtype=torch.float32) for name, t in tensors.items()}, path)


def assert_weight(weight, expected):
    """Within a dozen roundings of float32."""
    expected = torch.from_numpy(expected)
    assert (weight.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_formulas(form, layer, pipe, tmp_path):
    if form in (tucker, loha_tucker, lokr_tucker):
        layer = {"linear": "conv", "text": "1x1"}.get(layer, layer)  # there is no core without a kernel
    key, weight = one(pipe, layer)
    w = weight.double().numpy()
    n, m, *k = w.shape
    tensors, product, rank = form(n, m, k, 3)
    product = product if rank is None else 5 / rank * product
    for axis in (None, 0, 1):  # of the outputs, of the inputs
        dw = product
        if axis is not None:
            shape = [1] * w.ndim
            shape[axis] = w.shape[axis]
            tensors["dora_scale"] = np.abs(drawn(*shape))
            dw = dora(w, dw, tensors["dora_scale"], tuple({*range(w.ndim)} - {axis}))
        lora = pipe.load_lora(to_file(key, tensors | {"alpha": 5.0}, tmp_path / f"{axis}.safetensors"), scale=0.7)
        assert np.abs(dw).max() > 0.1
        assert_weight(weight, w + 0.7 * dw)
        lora.scale = -1.5
        assert_weight(weight, w - 1.5 * dw)
        lora.remove()


@pytest.mark.parametrize(
    ("shape", "layer"), [((), "1x1"), ((1, 1), "linear")], ids=["matrix for conv", "conv for matrix"]
)
def test_a_1x1_convolution_is_a_matrix(shape, layer, pipe, tmp_path):
    key, weight = one(pipe, layer)
    w = weight.double().numpy()
    up, down = drawn(len(w), 3), drawn(3, w.shape[1])
    tensors = {"lora_up.weight": up.reshape(*up.shape, *shape), "lora_down.weight": down.reshape(*down.shape, *shape)}
    pipe.load_lora(to_file(key, tensors, tmp_path / "lora.safetensors"))
    assert_weight(weight, w + (up @ down).reshape(w.shape))  # without alpha the scale is 1


def test_dora_where_nothing_is_left(pipe, tmp_path):
    """An output that the change cancels has no direction, and stays 0."""
    key, weight = one(pipe, "linear")
    w = weight.double().numpy()
    f, dw, _ = lora(*w.shape, (), 3)
    dw[4], f["lora_up.weight"][4], weight.data[4] = 0, 0, 0
    m = np.abs(drawn(len(w), 1))
    pipe.load_lora(to_file(key, f | {"dora_scale": m}, tmp_path / "lora.safetensors"))
    assert (weight[4] == 0).all()


def test_alpha_of_each(pipe, tmp_path):
    """Which may be a whole number, or a list of one, and even of one layer only."""
    alphas = [torch.tensor(4), torch.tensor([0.5]), None]
    tensors, expected = {}, {}
    for alpha, layer in zip(alphas, LAYERS, strict=False):
        key, weight = one(pipe, layer)
        f, dw, rank = lora(*weight.shape[:2], weight.shape[2:], 3)
        tensors |= {f"{key}.{name}": torch.as_tensor(t, dtype=torch.float32) for name, t in f.items()}
        if alpha is not None:
            tensors[f"{key}.alpha"] = alpha
        expected[weight] = weight.double().numpy() + (1 if alpha is None else alpha.item() / rank) * dw
    pipe.load_lora(saved(tensors, tmp_path / "lora.safetensors"))
    for weight, value in expected.items():
        assert_weight(weight, value)


# Several, changed and removed


@pytest.fixture
def files(pipe, tmp_path):
    """Three: of all layers, of the attention, of one layer with DoRA."""
    key, weight = one(pipe, "conv")
    f, _, _ = lora(*weight.shape[:2], weight.shape[2:], 3)
    return [
        saved(plain(pipe, lambda part, path: kohya(part, path, te="te")), tmp_path / "a.safetensors"),
        saved(
            plain(pipe, "{}.{}".format, "lora_B.weight", "lora_A.weight", None, attention), tmp_path / "b.safetensors"
        ),
        to_file(key, f | {"dora_scale": drawn(len(weight), 1, 1, 1)}, tmp_path / "c.safetensors"),
    ]


def assert_bitwise(pipe, before):
    """The very values, in the very memory."""
    for name, p in weights(pipe).items():
        value, address = before[name]
        assert torch.equal(p, value) and p.dtype == value.dtype and p.data_ptr() == address, name


def snapshot(pipe):
    return {name: (p.detach().clone(), p.data_ptr()) for name, p in weights(pipe).items()}


def test_pipelines_that_share_a_net(sd1, pipe, files):
    """Each LoRA is out when it is removed, and the weights are the originals when all are, in whatever order."""
    other = ldm.Pipeline.from_pretrained(sd1[0])
    other.unet, other.text_encoder = pipe.unet, pipe.text_encoder
    before = snapshot(pipe)
    for first in (0, 1):
        pair = [pipe.load_lora(files[0]), other.load_lora(files[1])]
        alone = ldm.Pipeline.from_pretrained(sd1[0])
        alone.load_lora(files[1 - first])
        assert (pipe.loras, other.loras) == ((pair[0],), (pair[1],))
        pair[first].remove()
        for name, p in weights(alone).items():
            assert torch.equal(weights(pipe)[name], p), name
        pair[1 - first].remove()
        assert_bitwise(pipe, before)


def test_removal_in_a_loop(pipe, files):
    before = snapshot(pipe)
    for file in files:
        pipe.load_lora(file)
    for lora in pipe.loras:
        lora.remove()
    assert pipe.loras == ()
    assert_bitwise(pipe, before)


def test_changes_have_versions(pipe, files):
    """By which packed copies of a weight are known to be old."""
    lora = pipe.load_lora(files[0])
    changed = [*lora.changes]

    def versions():
        return [weight._version for weight in changed]

    for change in (lambda: setattr(lora, "scale", 0.5), lambda: setattr(lora, "scale", 1), lora.remove):
        before = versions()
        change()
        assert changed and all(new > old for old, new in zip(before, versions(), strict=True))


def test_a_file_that_is_written_again(pipe, files, tmp_path):
    """As a training does: what is loaded stays what it was."""
    path = tmp_path / "last.safetensors"
    path.write_bytes(files[0].read_bytes())
    lora = pipe.load_lora(path, 0.5)
    expected = {name: p.clone() for name, p in weights(pipe).items()}
    with path.open("r+b") as file:
        file.truncate(100)
    lora.scale = 1
    lora.scale = 0.5
    assert all(torch.equal(p, expected[name]) for name, p in weights(pipe).items())


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_several(order, sd1, pipe, files):
    before = snapshot(pipe)
    scales = 0.8, -1.3, 0.4
    loras = [pipe.load_lora(file, scale) for file, scale in zip(files, scales, strict=True)]
    assert pipe.loras == tuple(loras) and [lora.scale for lora in loras] == [*scales]
    key = "unet", "down_blocks.0.resnets.0.conv1.weight"
    w, tensors, other = before[key][0].double().numpy(), load_file(files[0]), load_file(files[2])
    expected = w.copy()
    for i, t in enumerate((tensors, other)):
        up, down = (
            t[f"lora_unet_down_blocks_0_resnets_0_conv1.lora_{x}.weight"].double().numpy() for x in ("up", "down")
        )
        dw = np.einsum("nrkl,rmkl->nm" if down.shape[2] == 1 else "nrij,rmkl->nmkl", up, down)
        if i == 0:
            expected += 0.8 * 2 / 3 * dw
        else:
            expected += 0.4 * dora(w, dw, t["lora_unet_down_blocks_0_resnets_0_conv1.dora_scale"].numpy(), (1, 2, 3))
    assert_weight(weights(pipe)[key], expected)

    together = snapshot(pipe)
    for i in order:  # there and back
        loras[i].scale = 3
    for i, scale in enumerate(scales):
        loras[i].scale = scale
    for name, p in weights(pipe).items():
        assert torch.equal(p, together[name][0])

    left = list(range(3))
    for i in order:
        loras[i].remove()
        left.remove(i)
        fresh = ldm.Pipeline.from_pretrained(sd1[0])
        for j in left:
            fresh.load_lora(files[j], scales[j])
        assert pipe.loras == tuple(loras[j] for j in left)
        for name, p in weights(fresh).items():
            assert torch.equal(p, weights(pipe)[name]), name
    assert_bitwise(pipe, before)
    with pytest.raises(ValueError, match=r"c\.safetensors has been removed: .* load it again"):
        loras[2].scale = 1
    with pytest.raises(ValueError, match="has been removed"):
        loras[2].remove()


def test_scale_0_is_without_it(pipe, files):
    before = snapshot(pipe)
    loras = [pipe.load_lora(file, 0) for file in files]
    assert_bitwise(pipe, before)
    for lora in loras:
        lora.scale = 1.0
    assert all(not torch.equal(weight, before[part, f"{path}.weight"][0]) for part, path, weight in modules(pipe))
    for lora in loras:
        lora.scale = 0.0
    assert_bitwise(pipe, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, pipe, files):
    """One rounding, at the end."""
    exact = {name: p.double() for name, p in weights(pipe).items()}
    for net in nets(pipe).values():
        net.to(dtype)
    before = snapshot(pipe)
    low = {name: p.float() for name, p in weights(pipe).items()}
    loras = [pipe.load_lora(file) for file in files[:2]]
    for part, path, weight in modules(pipe):
        w = low[part, f"{path}.weight"]
        for lora in loras:
            if weight in lora.changes:
                w = w + 1.0 * lora.changes[weight](low[part, f"{path}.weight"])
        assert weight.dtype == dtype and torch.equal(weight, w.to(dtype))
        assert not torch.equal(weight, exact[part, f"{path}.weight"].to(dtype))
    for lora in loras:
        lora.remove()
    assert_bitwise(pipe, before)


def test_a_net_that_is_cast_meanwhile(pipe, files):
    before = snapshot(pipe)
    lora = pipe.load_lora(files[0])
    pipe.unet.to(torch.bfloat16)
    lora.remove()
    for (part, name), p in weights(pipe).items():
        dtype = torch.bfloat16 if part == "unet" else torch.float32
        assert p.dtype == dtype and torch.equal(p, before[part, name][0].to(dtype))


# Errors, which leave all weights as they were


def without(tensors, *names):
    return {name: t for name, t in tensors.items() if not name.endswith(names)}


def changed(tensors, end, change):
    return {name: change(t) if name.endswith(end) else t for name, t in tensors.items()}


Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
ERRORS = {
    "float8": (
        lambda f: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in f.items()},
        r"(?s)of a type other than torch.float64, .*: torch.float8_e4m3fn",
    ),
    "an alpha of yes": (
        lambda f: f | {f"{Q}.alpha": torch.tensor(True)},
        rf"1 of a type other than (?s:.*){Q}\.alpha: torch.bool",
    ),
    "unmatched": (
        lambda f: f | {f"lora_unet_other_{i}.lora_up.weight": torch.zeros(2, 2) for i in range(7)},
        r"(?s)7 unmatched: .*lora_unet_other_0\.lora_up\.weight.*lora_unet_other_4\.lora_up\.weight\n  and 2 more",
    ),
    "a kind": (
        lambda f: f | {f"{Q}.diff": torch.zeros(2, 2), f"{Q}.oft_blocks": torch.zeros(2, 2)},
        rf"(?s)2 of a kind that is not supported: LoRA, LoHa, .*{Q}\.diff\n  {Q}\.oft_blocks",
    ),
    "a bias": (
        lambda f: f | {"unet.conv_in.lora_B.bias": torch.zeros(16)},
        r"1 of a kind that is not supported.*\n  unet\.conv_in\.lora_B\.bias",
    ),
    "no up": (
        lambda f: without(f, f"{Q}.lora_up.weight"),
        rf"1 incomplete: what belongs with them is missing:\n  {Q}\.alpha \(\), {Q}\.lora_down\.weight \(3, 32\)",
    ),
    "alpha alone": (
        lambda f: without(f, f"{Q}.lora_up.weight", f"{Q}.lora_down.weight"),
        rf"1 incomplete.*\n  {Q}\.alpha",
    ),
    "two kinds": (
        lambda f: f | {f"{Q}.lokr_w1": torch.ones(2, 2), f"{Q}.lokr_w2": torch.ones(16, 16)},
        rf"1 incomplete.*\n  {Q}\.alpha .*{Q}\.lokr_w1",
    ),
    "twice": (
        lambda f: f | {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(3, 32)},
        r"1 given twice:\n  .*lora_.*mid_block.*lora_",
    ),
    "rank": (
        lambda f: changed(f, f"{Q}.lora_up.weight", lambda t: t[:, :2]),
        rf"1 of another shape:\n  .*{Q}\.lora_up\.weight \(32, 2\): mid_block\..*to_q is \(32, 32\)",
    ),
    "no rank": (
        lambda f: changed(
            changed(f, f"{Q}.lora_up.weight", lambda t: t[:, :0]), f"{Q}.lora_down.weight", lambda t: t[:0]
        ),
        r"1 of another shape",
    ),
    "turned": (lambda f: changed(f, "conv1.lora_down.weight", lambda t: t.transpose(0, 1)), r"\d of another shape"),
    "width": (lambda f: changed(f, f"{Q}.lora_down.weight", lambda t: t[:, :31]), r"1 of another shape"),
    "one axis": (lambda f: changed(f, f"{Q}.lora_down.weight", lambda t: t[0]), r"1 of another shape"),
    "alphas": (lambda f: changed(f, f"{Q}.alpha", lambda t: t.expand(2)), r"1 of another shape"),
    "magnitude": (
        lambda f: f | {f"{Q}.dora_scale": torch.ones(31, 1)},
        r"1 of another shape:\n  .*dora_scale \(31, 1\)",
    ),
    "one magnitude": (lambda f: f | {f"{Q}.dora_scale": torch.ones(())}, r"1 of another shape"),
    "loha": (
        lambda f: (
            without(f, f"{Q}.lora_up.weight", f"{Q}.lora_down.weight")
            | {
                f"{Q}.hada_w{i}_{x}": torch.ones(*s)
                for i in "12"
                for x, s in {"a": (30 + int(i), 3), "b": (3, 32)}.items()
            }
        ),
        r"1 of another shape",
    ),
    "lokr": (
        lambda f: (
            without(f, f"{Q}.lora_up.weight", f"{Q}.lora_down.weight")
            | {f"{Q}.lokr_w1": torch.ones(4), f"{Q}.lokr_w2": torch.ones(8, 32)}
        ),
        r"1 of another shape",
    ),
    "NaN": (
        lambda f: changed(f, f"{Q}.lora_down.weight", lambda t: t * torch.nan),
        rf"1 with NaN or infinity:\n  {Q}\.lora_down\.weight",
    ),
    "alpha is infinite": (lambda f: changed(f, f"{Q}.alpha", lambda t: t * torch.inf), r"1 with NaN or infinity"),
    "whole numbers": (
        lambda f: changed(f, f"{Q}.lora_up.weight", lambda t: t.to(torch.int8)),
        r"1 of a type other than torch\.float64, .*:\n  .*: torch\.int8",
    ),
    "nothing": (lambda f: {}, r"it is empty"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error, pipe, files, tmp_path):
    spoil, match = ERRORS[error]
    kept = pipe.load_lora(files[1], 0.5)
    before = snapshot(pipe)
    file = saved(spoil(load_file(files[0])), tmp_path / "spoilt.safetensors")
    with pytest.raises(CheckpointError, match=match) as raised:
        pipe.load_lora(file)
    assert str(raised.value).startswith(f"{file} is no LoRA for this model:")
    assert pipe.loras == (kept,)
    assert_bitwise(pipe, before)


@pytest.mark.parametrize("name", ["kohya", "dotted"])
def test_a_lora_for_another_model(name, xl, pipe, tmp_path, monkeypatch):
    other = ldm.Pipeline.from_pretrained(xl[0])
    monkeypatch.setitem(ldm.lora.MADE_FOR, 56, "tiny SDXL")
    if name == "kohya":
        tensors = plain(other, lambda part, path: kohya(part, path, other.unet.config))
    else:
        tensors = plain(other, "{}.{}".format, "lora_B.weight", "lora_A.weight")
    file, before = saved(tensors, tmp_path / "xl.safetensors"), snapshot(pipe)
    match = (
        r"xl\.safetensors is no LoRA for this model, but looks made for tiny SDXL \(width of the context 56, here 24\):"
    )
    with pytest.raises(CheckpointError, match=match + r"\n\d+ unmatched"):
        pipe.load_lora(file)
    assert_bitwise(pipe, before)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "1", None])
def test_scales_that_are_no_numbers(scale, pipe, files):
    with pytest.raises(ValueError, match=r"scale=.*: use a finite number"):
        pipe.load_lora(files[1], scale)
    lora = pipe.load_lora(files[1], 0.5)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=r"scale=.*: use a finite number"):
        lora.scale = scale
    assert lora.scale == 0.5
    assert_bitwise(pipe, before)


def values(pipe):
    return {name: p.detach().clone() for name, p in weights(pipe).items()}


def test_an_overflow_changes_nothing(pipe, files):
    pipe.unet.half()
    before = snapshot(pipe)
    with pytest.raises(
        ValueError, match=r"a\.safetensors, scale=1000000\.0: a weight overflows torch\.float16; use a sm"
    ):
        pipe.load_lora(files[0], 1e6)
    assert pipe.loras == ()
    assert_bitwise(pipe, before)
    lora = pipe.load_lora(files[0], 0.5)
    half = values(pipe)
    with pytest.raises(ValueError, match="overflows"):
        lora.scale = 1e6
    assert lora.scale == 0.5
    assert all(torch.equal(p, half[name]) for name, p in weights(pipe).items())


def test_an_interruption_changes_nothing(pipe, files, monkeypatch):
    before, count = snapshot(pipe), iter(range(50))

    def interrupted(change, w0, call=Change.__call__):
        if next(count, None) == 20:
            raise KeyboardInterrupt
        return call(change, w0)

    monkeypatch.setattr(Change, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.load_lora(files[0])
    assert pipe.loras == ()
    assert_bitwise(pipe, before)


HEADERS = {
    "[]": "lora_adapter_metadata in its header is no JSON object",
    "{": "lora_adapter_metadata in its header is no JSON object",
    '{"unet.lora_alpha": "4"}': "lora_alpha is '4', but this version only does numbers",
    '{"unet.r": 4}': "lora_alpha is None",
    '{"unet.lora_alpha": 4, "unet.use_rslora": 1}': "use_rslora is 1",
    '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 2}}': "alpha_pattern is .*regular expressions",
    '{"unet.lora_alpha": 4, "unet.alpha_pattern": [2]}': "alpha_pattern is ",
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers(header, pipe, files, tmp_path):
    before = snapshot(pipe)
    file = saved(load_file(files[1]), tmp_path / "spoilt.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(CheckpointError, match=rf"spoilt\.safetensors: {HEADERS[header]}"):
        pipe.load_lora(file)
    assert_bitwise(pipe, before)


def test_files_that_are_none(pipe, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        pipe.load_lora(tmp_path / "lora.safetensors")
    (tmp_path / "lora.pt").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError, match="is a pickle"):
        pipe.load_lora(tmp_path / "lora.pt")


# Names


def on_meta(model):
    """The nets of a full-size model, without values."""
    configs = {part: getattr(model, part) for part in PARTS if getattr(model, part) is not None}
    with torch.device("meta"):
        return {part: checkpoint.NETS[part][0](config) for part, config in configs.items()}


@pytest.mark.parametrize("model", ["SD1", "SD2", "SDXL", "REFINER"])
def test_the_names_are_a_bijection(model):
    """No name means two weights, and every weight has all its names."""
    nets = on_meta(getattr(models, model))
    layers = {
        (part, path): module
        for part, net in nets.items()
        for path, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    table, owners = spelled(nets), {}
    for part, path in layers:
        for name in spellings(part, path, nets[part], len(nets) == 2):
            assert owners.setdefault(name, (part, path)) == (part, path), name
    assert {name: (target.part, target.path) for name, target in table.items()} == owners
    assert {*owners.values()} == {*layers}
    assert all(target.weight is layers[target.part, target.path].weight for target in table.values())
    config = nets["unet"].config
    for part, path in layers:
        tes = ("te", "te1") if part == "text_encoder" else ("te2",)
        for name in {kohya(part, path, c, te) for c in (None, config) for te in tes}:
            target, suffix = split(f"{name}.lora_down.weight", table)
            assert (target.part, target.path, suffix) == (part, path, "lora_down.weight")


@pytest.mark.parametrize(("model", "layout"), [("SD1", "sd15"), ("SD2", "sd2"), ("SDXL", "sdxl_base")])
def test_official_names(model, layout):
    """Of all layers in the list of the official file, flattened, and of no other."""
    shapes = json.loads((KEYS / f"{layout}.json").read_text())
    prefix, table = "model.diffusion_model.", spelled(on_meta(getattr(models, model)))
    layers = {name: shape for name, shape in shapes.items() if name.startswith(prefix) and len(shape) > 1}
    names = {
        "lora_unet_" + name.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): shape
        for name, shape in layers.items()
    }
    assert len(names) == len(layers) > 200
    targets = {table[name].path: tuple(table[name].weight.shape) == tuple(shape) for name, shape in names.items()}
    assert len(targets) == len(names) and all(targets.values())


def test_names_as_they_are_in_files():
    """Written out: the same layer under its names."""
    table = spelled(on_meta(models.SDXL))
    same = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
            "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
        "up_blocks.0.upsamplers.0.conv": (
            "lora_unet_output_blocks_2_2_conv",
            "lora_unet_up_blocks_0_upsamplers_0_conv",
        ),
        "add_embedding.linear_2": ("lora_unet_label_emb_0_2", "lora_unet_add_embedding_linear_2"),
        "text_projection": ("lora_te2_text_projection", "text_encoder_2.text_projection"),
        "text_model.encoder.layers.31.self_attn.q_proj": (
            "lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj",
            "text_encoder_2.encoder.layers.31.self_attn.q_proj",
            "text_encoder_2.encoder.layers.31.self_attn.to_q_lora",
        ),
        "text_model.encoder.layers.0.mlp.fc1": (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ),
    }
    for path, names in same.items():
        for name in names:
            assert table[name].path == path, name
    # Of two text encoders a name without theirs would mean either.
    assert "base_model.model.text_model.encoder.layers.0.mlp.fc1" not in table
    assert "base_model.model.encoder.layers.0.mlp.fc1" in spelled(on_meta(models.SD1))
