"""LoRA in training, beside diffusers' nets with PEFT's adapters; and what is saved, read by both."""

import copy
import json

import family
import pytest
import torch
from diffusers.training_utils import cast_training_params
from parity import diffusers_unet, randomise, text_prefix, transformers_text, twin
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

import ldm
from ldm.clip import TextEncoder
from ldm.train.adapters import add_lora, save_lora
from ldm.unet import UNet, vector_embedding

STEPS, TOLERANCE = 20, 1e-5
CONVOLUTIONS = ["conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "conv"]
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
LINEAR += ["linear_1", "linear_2"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unet_pair(config):
    """diffusers' net, ours on copies of its weights, and a function that calls either on a batch."""
    reference = randomise(diffusers_unet(config, 256))

    def call(net, x, t, context, pooled, numbers):
        if isinstance(net, UNet):
            return net(x, t, context, None if config.vector_width is None else vector_embedding(pooled, numbers))
        condition = {"text_embeds": pooled, "time_ids": numbers}
        return net(x, t, encoder_hidden_states=context, added_cond_kwargs=condition).sample

    def batch(step):
        g = generator(step)
        x, target = torch.randn(2, 2, 4, 8, 8, generator=g)
        context = torch.randn(2, 77, config.context_width, generator=g)
        pooled, numbers = torch.randn(2, 32, generator=g), 60 * torch.rand(2, 6, generator=g)
        return (x, torch.tensor([3, 700]), context, pooled, numbers), target

    return reference, twin(UNet, config, copy.deepcopy(reference)), call, batch


def text_pair(config):
    reference = randomise(transformers_text(config))

    def call(net, ids):
        if isinstance(net, TextEncoder):
            context, pooled = net(ids)
        else:
            out = net(ids, output_hidden_states=True)
            context = out.hidden_states[-2] if config.skip else out.last_hidden_state
            pooled = out.text_embeds if config.projection else out.pooler_output
        return torch.cat([context, pooled[:, None]], dim=1)  # (B,78,width): SDXL's second projects to its own width

    def batch(step):
        g = generator(step)
        ids = torch.randint(0, 500, (2, 77), generator=g)
        ids[:, 40] = config.end_token
        return (ids,), torch.randn(2, 78, config.width, generator=g)

    ours = twin(TextEncoder, config, copy.deepcopy(reference), text_prefix(reference))
    return reference, ours, call, batch


PAIRS = {
    "SD 1": lambda: unet_pair(family.SD1.unet),
    "SDXL": lambda: unet_pair(family.XL.unet),
    "text": lambda: text_pair(family.SD1.text_encoder),
    "SDXL's second text": lambda: text_pair(family.XL.text_encoder_2),
}


def trained(net, parameters, call, batch, steps=STEPS):
    """The losses of a loop without any of ours."""
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
    losses = []
    for step in range(steps):
        inputs, target = batch(step)
        loss = torch.nn.functional.mse_loss(call(net, *inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PARITY = [  # net, our targets, PEFT's, rank, alpha, how many modules
    ("SD 1", "attention", ATTENTION, 4, 6, 32),
    ("SD 1", "conv", LINEAR + CONVOLUTIONS, 2, 1, 83),
    ("SDXL", "attention", ATTENTION, 3, None, 64),
    ("SDXL", "all-linear", LINEAR, 2, 5, 100),
    ("SDXL", ["attn2.to_k", "ff.net.2"], ["attn2.to_k", "ff.net.2"], 2, 5, 16),
    ("text", "attention", ["q_proj", "k_proj", "v_proj", "out_proj"], 4, 6, 12),
    ("SDXL's second text", "all-linear", "all-linear", 2, 3, 19),
]


@pytest.mark.parametrize(("kind", "targets", "theirs", "rank", "alpha", "count"), PARITY)
def test_training_beside_peft(kind, targets, theirs, rank, alpha, count):
    """From the same factors, on the same batches: every loss, and every factor at the end."""
    reference, net, call, batch = PAIRS[kind]()
    adapters = add_lora(net, rank, alpha, targets, generator())
    reference.add_adapter(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=theirs), adapter_name="it")
    prefix = text_prefix(reference) if isinstance(net, TextEncoder) else ""
    layers = {f"{prefix}{name}": m for name, m in reference.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == count and sorted(layers) == sorted(adapters.paths)
    factors = []
    for path, adapter in zip(adapters.paths, adapters.layers.values(), strict=True):
        a, b = layers[path].lora_A["it"].weight, layers[path].lora_B["it"].weight
        a.data.copy_(adapter.down)
        factors += [(adapter.down, a), (adapter.up, b)]
    start = [own.detach().clone() for own, _ in factors]
    ours = trained(net, adapters.parameters(), call, batch)
    others = trained(reference, [p for p in reference.parameters() if p.requires_grad], call, batch)
    assert ours == pytest.approx(others, rel=TOLERANCE)
    for (own, other), before in zip(factors, start, strict=True):
        assert relative(own, other) <= TOLERANCE
        assert (own - before).abs().max() > 0.01  # of 20 steps of 0.003: all have learnt


def test_half_precision_beside_peft():
    """Under a bf16 net the factors are float32, and so are their products, as with diffusers' cast_training_params."""
    reference, net, call, batch = PAIRS["SD 1"]()
    reference, net = reference.bfloat16(), net.bfloat16()
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in batch(0)[0])
    adapters = add_lora(net, 4, 6, "conv", generator())
    reference.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR + CONVOLUTIONS), adapter_name="it")
    cast_training_params(reference, torch.float32)
    for path, adapter in zip(adapters.paths, adapters.layers.values(), strict=True):
        layer = reference.get_submodule(path)
        assert adapter.down.dtype == adapter.up.dtype == torch.float32
        draw_up(adapter)
        layer.lora_A["it"].weight.data.copy_(adapter.down)
        layer.lora_B["it"].weight.data.copy_(adapter.up)
    ours = call(net, *inputs)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, call(reference, *inputs))
    adapters.remove()
    assert not torch.equal(ours, call(net, *inputs))


def draw_up(adapters):
    """As if it had been trained."""
    with torch.no_grad():
        for name, factor in adapters.named_parameters():
            if name.endswith("up"):
                factor.normal_(std=0.3)


# The net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["SD 1", "text"])
def test_the_net_starts_and_ends_as_it_was(kind, dtype):
    _, net, call, batch = PAIRS[kind]()
    net.to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in batch(0)[0])
    next(net.parameters()).requires_grad_(False)  # all others ask for gradients
    asked = [p.requires_grad for p in net.parameters()]
    tensors, modules = dict(net.state_dict()), [name for name, _ in net.named_modules()]
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    before = call(net, *inputs)
    adapters = add_lora(net, 4, targets="conv" if kind == "SD 1" else "attention", generator=generator())
    assert torch.equal(call(net, *inputs), before)
    assert [name for name, _ in net.named_modules()] == modules
    trained(net, adapters.parameters(), lambda net, *_: call(net, *inputs).float(), batch, 2)
    assert not torch.equal(call(net, *inputs), before)
    adapters.remove()
    assert torch.equal(call(net, *inputs), before)
    assert [p.requires_grad for p in net.parameters()] == asked
    after = net.state_dict()
    assert list(after) == list(tensors)
    for name, tensor in after.items():
        assert tensor.data_ptr() == tensors[name].data_ptr()
        assert torch.equal(tensor, values[name])


def test_only_factors_learn():
    _, net, call, batch = PAIRS["SDXL"]()
    weights = {p.data_ptr() for p in net.parameters()}
    adapters = add_lora(net, 2, targets="conv")
    assert not weights & {p.data_ptr() for p in adapters.parameters()}
    optimizer = torch.optim.AdamW(adapters.parameters())
    inputs, target = batch(0)
    torch.nn.functional.mse_loss(call(net, *inputs), target).backward()
    optimizer.step()
    assert all(not p.requires_grad and p.grad is None for p in net.parameters())
    modules = [net.get_submodule(path) for path in adapters.paths]
    count = sum(2 * (m.weight.shape[0] + m.weight[0].numel()) for m in modules)
    assert sum(p.numel() for p in adapters.parameters()) == count < sum(p.numel() for p in net.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    assert sum(x.numel() for x in moments) == 2 * count


def test_initial_factors():
    """PEFT's: down uniform within 1/sqrt(fan in), up zero. A generator makes the draw its own."""
    _, net, _, _ = PAIRS["SD 1"]()
    one, two, other = (add_lora(net, 8, targets="conv", generator=generator(seed)) for seed in (0, 0, 1))
    for path, adapter in zip(one.paths, one.layers.values(), strict=True):
        bound = net.get_submodule(path).weight[0].numel() ** -0.5
        assert 0.9 * bound < adapter.down.abs().max() <= bound
        assert not adapter.up.any()
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert not any(map(torch.equal, (a.down for a in one.layers.values()), (a.down for a in other.layers.values())))


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_without_what_nobody_reads(layout, tmp_path):
    """Clip skip 2 of a text encoder of three layers: every factor beside the first two learns, no other is kept."""

    def adapted(*without):
        net = TextEncoder(family.SD1.text_encoder)
        return net, add_lora(net, 4, 6, "all-linear", generator(), (net.get_submodule(path) for path in without))

    last = "text_model.encoder.layers.2"
    _, every = adapted()
    _, some = adapted(f"{last}.self_attn")
    assert [path for path in every.paths if path not in some.paths] == [
        f"{last}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    net, adapters = adapted(last)
    assert adapters.paths == [path for path in every.paths if not path.startswith(last)]
    assert len(adapters.paths) == len(every.paths) - 6 == 12
    assert not any(p.requires_grad for p in net.parameters())
    net(torch.arange(77)[None], clip_skip=2).context.square().sum().backward()
    assert all(adapter.up.grad.any() for adapter in adapters.layers.values())
    save_lora(tmp_path / "lora.safetensors", {"text_encoder": adapters}, layout)
    names = load_file(tmp_path / "lora.safetensors").keys()
    assert len(names) == 12 * (3 if layout == "kohya" else 2)
    assert not any("layers.2" in name.replace("_", ".") for name in names)
    assert any("layers.1" in name.replace("_", ".") for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "^rank=0: use a whole number from 1$"),
        ({"rank": -2, "alpha": 1}, "^rank=-2: use"),
        ({"rank": 4, "alpha": -1}, "^alpha=-1: use a finite number above 0$"),
        ({"rank": 4, "alpha": 0}, "^alpha=0: use"),
        ({"rank": 4, "alpha": float("nan")}, "^alpha=nan: use"),
        ({"rank": 4, "targets": "to_q"}, "targets='to_q': use 'attention', 'all-linear', 'conv', or a list of names"),
        (
            {"rank": 4, "targets": ["to_q", "q_proj"]},
            r"this UNet ends in \['q_proj'\]; its modules end in conv, .* net.2, ",
        ),
        ({"rank": 4, "targets": ["o_q"]}, r"of this UNet ends in \['o_q'\]"),
        ({"rank": 4, "targets": []}, r"targets=\[\]: .* ends in nothing"),
    ],
)
def test_what_cannot_be(options, message):
    net = UNet(family.SD1.unet)
    with pytest.raises(ValueError, match=message):
        add_lora(net, **options)
    assert all(p.requires_grad for p in net.parameters())


# Files


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    reference = family.sd(family.SD1)
    object.__delattr__(reference.text_encoder, "text_model")  # a stand-in, by which diffusers' loader would go
    return written(reference, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return written(family.xl(family.XL), tmp_path_factory.mktemp("model"))


def written(reference, folder):
    reference.set_progress_bar_config(disable=True)
    reference.save_pretrained(folder)
    return folder, reference


# A low guidance, as it multiplies what float32 rounds, which on some machines is more.
CALL = {"prompt": "a cat", "negative_prompt": "the red", "steps": 2, "guidance_scale": 2}


def with_adapters(folder, targets="attention"):
    """A pipeline with adapters on all its nets that look as if they had been trained."""
    pipe = ldm.Pipeline.from_pretrained(folder)
    ranks = {"unet": (4, 6), "text_encoder": (3, 1.5), "text_encoder_2": (2, 5)}
    nets = {part: getattr(pipe, part) for part in ranks if getattr(pipe, part) is not None}
    adapters = {part: add_lora(net, *ranks[part], targets, generator()) for part, net in nets.items()}
    torch.manual_seed(5)
    for own in adapters.values():
        draw_up(own)
    return pipe, adapters


def run(pipe):
    return family.ours(pipe, sampler="ddim" if pipe.text_encoder_2 is None else "euler", **CALL)


@pytest.mark.parametrize("targets", ["attention", "conv"])
@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("model", ["sd1", "xl"])
def test_what_is_saved_is_what_was_trained(model, layout, targets, request, tmp_path):
    """Loaded here and by diffusers, whole runs end in the latents of the net with its adapters."""
    folder, reference = request.getfixturevalue(model)
    pipe, adapters = with_adapters(folder, targets)
    file = tmp_path / "lora.safetensors"
    save_lora(file, adapters, layout)
    wanted = run(pipe)
    for own in adapters.values():
        own.remove()
    plain = run(pipe)
    assert relative(plain, wanted) > 0.1
    lora = pipe.load_lora(file)
    assert len(lora.changes) == sum(len(own.paths) for own in adapters.values())
    assert relative(run(pipe), wanted) <= TOLERANCE
    reference.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="it")
    try:
        theirs = family.theirs(reference, **CALL)
        layers = [m for part in adapters for m in getattr(reference, part).modules() if hasattr(m, "lora_A")]
    finally:
        reference.unload_lora_weights()
    assert len(layers) == len(lora.changes)
    assert relative(theirs, wanted) <= TOLERANCE


NAMES = {  # as in files that kohya's scripts and diffusers have written
    ("sd1", "kohya"): {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight": (4, 16),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": (32, 4),
        "lora_te_text_model_encoder_layers_2_self_attn_q_proj.lora_down.weight": (3, 24),
        "lora_te_text_model_encoder_layers_2_self_attn_q_proj.alpha": (),
    },
    ("xl", "kohya"): {
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_out_0.lora_down.weight": (4, 32),
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.lora_up.weight": (32, 4),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (3, 24),
        "lora_te2_text_model_encoder_layers_2_self_attn_out_proj.lora_up.weight": (32, 2),
    },
    ("xl", "peft"): {
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0.lora_A.weight": (4, 32),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": (3, 24),
        "text_encoder_2.text_model.encoder.layers.2.self_attn.out_proj.lora_B.weight": (32, 2),
    },
}


@pytest.mark.parametrize(("model", "layout"), NAMES)
def test_names(model, layout, request, tmp_path):
    _, adapters = with_adapters(request.getfixturevalue(model)[0])
    save_lora(tmp_path / "lora.safetensors", adapters, layout)
    tensors = load_file(tmp_path / "lora.safetensors")
    assert len(tensors) == (3 if layout == "kohya" else 2) * sum(len(own.paths) for own in adapters.values())
    for name, shape in NAMES[model, layout].items():
        assert tensors[name].shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(sd1, dtype, tmp_path):
    """The factors are rounded, alpha is not."""
    _, adapters = with_adapters(sd1[0])
    own = adapters["unet"]
    own.alpha = 1.2345678
    save_lora(tmp_path / "lora.safetensors", adapters, dtype=dtype)
    tensors = load_file(tmp_path / "lora.safetensors")
    for name, adapter in own.layers.items():
        assert torch.equal(tensors[f"lora_unet_{name}.lora_down.weight"], adapter.down.to(dtype))
        assert torch.equal(tensors[f"lora_unet_{name}.lora_up.weight"], adapter.up.to(dtype))
        assert tensors[f"lora_unet_{name}.alpha"].item() == torch.tensor(1.2345678).item()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("unet", "SD 1"), {"ss_network_dim": "4", "ss_base_model_version": "sd_v1", "ss_v2": "False"}),
        (("unet", "SD 2"), {"ss_network_alpha": "1.5", "ss_base_model_version": "sd_v2", "ss_v2": "True"}),
        (("unet", "SDXL"), {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}),
        (("text_encoder", "SD 1"), {"ss_base_model_version": "sd_v1"}),
        (("text_encoder", "SD 2"), {"ss_base_model_version": "sd_v2"}),
        (("text_encoder", "SDXL"), {"ss_base_model_version": "sdxl_base_v1-0"}),
        (("text_encoder_2", "SDXL"), {"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0"}),
    ],
)
def test_kohyas_metadata(parts, expected, tmp_path):
    part, model = parts
    config = getattr(family.MODELS[model], part)
    net = UNet(config) if part == "unet" else TextEncoder(config)
    save_lora(tmp_path / "lora.safetensors", {part: add_lora(net, 4, 1.5)})
    assert expected.items() <= metadata(tmp_path).items()


def metadata(folder):
    with safe_open(folder / "lora.safetensors", "pt") as file:
        return file.metadata()


def test_metadata_of_several_parts(xl, tmp_path):
    _, adapters = with_adapters(xl[0])
    save_lora(tmp_path / "lora.safetensors", adapters)
    assert metadata(tmp_path)["ss_network_dim"] == metadata(tmp_path)["ss_network_alpha"] == "Dynamic"
    save_lora(tmp_path / "lora.safetensors", adapters, "peft")
    fields = json.loads(metadata(tmp_path)["lora_adapter_metadata"])
    assert {name: field for name, field in fields.items() if "target" not in name} == {
        **{"unet.r": 4, "unet.lora_alpha": 6, "unet.peft_type": "LORA"},
        **{"text_encoder.r": 3, "text_encoder.lora_alpha": 1.5, "text_encoder.peft_type": "LORA"},
        **{"text_encoder_2.r": 2, "text_encoder_2.lora_alpha": 5, "text_encoder_2.peft_type": "LORA"},
    }
    assert fields["unet.target_modules"] == adapters["unet"].paths


def test_files_that_cannot_be(sd1, tmp_path):
    """The file that was there stays, and nothing beside it."""
    _, adapters = with_adapters(sd1[0])
    file = tmp_path / "lora.safetensors"
    save_lora(file, adapters)
    before = file.read_bytes()
    for arguments, message in (
        ({"layout": "webui"}, "layout='webui', dtype=torch.float32: use 'kohya' or 'peft'"),
        ({"dtype": torch.int8}, "dtype=torch.int8: use .* torch.float32, torch.float16, torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            save_lora(file, adapters, **arguments)
    for parts in ({}, {"vae": adapters["unet"]}):
        with pytest.raises(ValueError, match="give those of unet, text_encoder and text_encoder_2, by name"):
            save_lora(file, parts)
    with torch.no_grad():
        adapters["text_encoder"].layers["text_model_encoder_layers_1_self_attn_k_proj"].up[3, 1] = 1e5
    with pytest.raises(ValueError, match=r"1_self_attn_k_proj.lora_up has NaN or infinity in torch.float16"):
        save_lora(file, adapters, dtype=torch.float16)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
