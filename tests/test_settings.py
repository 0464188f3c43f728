"""What can be asked for; and what cannot is refused with a message that says what was given and what to do."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import SAMPLERS, Settings
from ldm.guidance import GUIDANCES, apg
from ldm.samplers import SPACINGS, euler
from ldm.settings import check_names

PICTURE = Image.new("RGB", (64, 64))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"steps": n}, rf"steps={re.escape(repr(n))}: .* 1 to 1000") for n in (0, -1, 1001, 2.0, "20", None, True)],
        *[({"strength": s}, rf"strength={s}: .* from 0 .* to 1") for s in (-0.01, 1.01, NAN, INF)],
        *[({"eta": e, "sampler": "ddim"}, rf"eta={e}: .* from 0 .* to 1") for e in (-0.1, 1.1, NAN)],
        ({"eta": 0.5}, "eta=0.5: the sampler 'euler' has no eta; it has s_churn, s_tmin, s_tmax, s_noise"),
        ({"sampler_options": {"order": 2}}, "order=2: the sampler 'euler' has no order; it has s_churn"),
        ({"sampler": "ddpm", "sampler_options": {"eta": 1}}, "eta=1: the sampler 'ddpm' has no eta; it has no options"),
        ({"sampler": "ddim", "eta": 1, "sampler_options": {"eta": 1}}, "eta and sampler_options.* say the same"),
        ({"sampler_options": ["s_churn"]}, "sampler_options=.* give a dictionary"),
        ({"guidance": "apgg"}, f"unknown guidance 'apgg': use {', '.join(GUIDANCES)}, or pass a function of"),
        *[({"guidance": g}, f"unknown guidance {re.escape(repr(g))}: use cfg") for g in (None, 7.5, ["apg"])],
        (
            {"guidance": lambda a, b: a},
            "guidance '<lambda>' .* too many positional .* called with eps_cond, eps_uncond",
        ),
        ({"guidance": lambda a, b, s, w: a}, "guidance '<lambda>' .* missing a required argument: 'w'"),
        ({"guidance": "apg", "guidance_options": {"r": 1}}, "r=1: the guidance 'apg' has no r; it has eta, norm_thres"),
        ({"guidance": "apg", "guidance_options": {"x": 1}}, "x=1: the guidance 'apg' has no x; it has eta"),
        ({"guidance_options": {"eta": 1}}, "eta=1: the guidance 'cfg' has no eta; it has no options"),
        ({"guidance_options": ["eta"]}, "guidance_options=.* give a dictionary"),
        *[
            ({"guidance_interval": n}, rf"guidance_interval={re.escape(repr(n))}: give two sigmas .* 0 <= low < high")
            for n in (1.5, (1,), (2, 1), (1, 1), (-1, 2), (0, NAN), ("0", "1"), (False, True), (torch.tensor(0), 1))
        ],
        *[({"guidance_scale": s}, f"guidance_scale={s}: give a number") for s in (NAN, INF)],
        *[({"width": n}, rf"width={n!r}: .* whole number of pixels") for n in (0, -64, 64.0, "64")],
        *[({"height": n}, rf"height={n!r}: .* whole number of pixels") for n in (0, -64, 64.0, "64")],
        *[({"batch_size": n}, rf"batch_size={n!r}: .* at least 1") for n in (0, -1, 1.5, True)],
        *[({"clip_skip": n}, rf"clip_skip={n!r}: .* from 1") for n in (0, -1, 1.5)],
        ({"sampler": "eular"}, f"unknown sampler 'eular': use {', '.join(SAMPLERS)}, or pass a function"),
        ({"sigmas": "karas"}, f"unknown spacing sigmas='karas': use {', '.join(SPACINGS)}, or pass a tensor"),
        ({"image": np.zeros((64, 64, 3))}, r"image is a ndarray: .* PIL\.Image\.open"),
        ({"image": "cat.png"}, r"image is a str: .* PIL\.Image\.open"),
        ({"image": PICTURE, "mask": np.zeros((64, 64))}, r"mask is a ndarray: .* PIL\.Image\.open"),
        ({"mask": PICTURE}, "mask without image: .* image="),
        ({"image": PICTURE, "latents": torch.zeros(1, 4, 16, 16)}, "image and latents both .* one of them"),
        *[({name: torch.zeros(4, 16, 16)}, rf"{name} has shape \(4, 16, 16\)") for name in ("latents", "noise")],
        *[({name: np.zeros((1, 4, 16, 16))}, f"{name} is a ndarray: give a tensor") for name in ("latents", "noise")],
        ({"prompt": []}, "prompt is an empty list: give at least one text"),
        ({"prompt": None}, "prompt=None: give a text, or a list of texts"),
        ({"prompt": ["a", 1]}, r"prompt=\['a', 1\]: give a text"),
        ({"negative_prompt": 3}, "negative_prompt=3: give a text, or a list of texts"),
        *[({name: 1.1}, rf"{name}=1\.1: give a number from 0 to 1") for name in ("guidance_rescale", "refiner_start")],
        *[({name: "1"}, f"{name}='1': give a number") for name in ("guidance_rescale", "aesthetic_score")],
        ({"original_size": 512}, "original_size=512: give two whole numbers of pixels, from 1"),
        ({"target_size": (0, 512)}, r"target_size=\(0, 512\): give two whole numbers of pixels, from 1"),
        ({"crops_coords_top_left": (-1, 0)}, r"crops_coords_top_left=\(-1, 0\): give two whole .* from 0"),
        ({"crops_coords_top_left": None}, "crops_coords_top_left=None: give two whole numbers"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "1 negative prompts for 2 prompts"),
        ({"prompt": "a", "negative_prompt": ["c", "d"]}, "2 negative prompts for 1 prompts"),
        ({"seed": [1, 2], "batch_size": 3}, "2 seeds for 3 pictures: .* one seed each"),
        ({"seed": [1, 2], "prompt": ["a", "b"], "batch_size": 2}, "2 seeds for 4 pictures"),
        ({"seed": []}, "0 seeds for 1 pictures"),
        *[
            ({"seed": s}, rf"seed={re.escape(repr(s))}: .* 0 or more, below 2\*\*64")
            for s in (None, -1, 1.5, 2**64, "1", [0.5])
        ],
        ({"seed": 2**64 - 1, "batch_size": 2}, "seed=18446744073709551615: "),
        *[({"subseed": s}, rf"subseed={re.escape(repr(s))}: .* below 2\*\*64") for s in (-1, 1.5, 2**64, "1", [0.5])],
        ({"subseed": [1, 2]}, "2 subseeds for 1 pictures: .* one subseed each"),
        *[({"subseed_strength": s, "subseed": 1}, f"subseed_strength={s}: .* from 0 to 1") for s in (-0.1, 1.1, NAN)],
        ({"subseed_strength": 0.5}, "subseed_strength=0.5 without a subseed: give subseed="),
        *[({"seed_resize_from": n}, "seed_resize_from=.* two whole numbers of pixels") for n in (64, (0, 64), (64,))],
        *[
            ({"noise": torch.zeros(1, 4, 8, 8), **varied}, "noise takes the place of")
            for varied in ({"subseed": 1, "subseed_strength": 0.5}, {"seed_resize_from": (64, 64)})
        ],
        *[({"tiling": t}, f"tiling={t!r}: use 'x', 'y', 'both', or None") for t in ("xy", True, "")],
        ({"sampler": None}, "unknown sampler None"),
        ({"sampler": 3}, "unknown sampler 3"),
        ({"strength": "0.5"}, "strength='0.5': give a number"),
        ({"guidance_scale": None}, "guidance_scale=None: give a number"),
        ({"sigmas": [1.0, 0.0]}, "sigmas is a list: give a spacing by name, or a tensor"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents of shape .* has NaN"),
        ({"noise": torch.full((1, 4, 8, 8), torch.inf)}, "noise of shape .* has NaN or infinity"),
        ({"prompt": "a \ud800 heart"}, "prompt=.* surrogate"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(**settings)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    {
        "one": (torch.tensor([1.0]), r"sigmas \(1,\) of torch.float32: give numbers"),
        "none": (torch.tensor([]), r"sigmas of shape \(0,\): give"),
        "matrix": (torch.tensor([[2.0, 1.0]]), r"sigmas of shape \(1, 2\): give"),
        "complex": (torch.tensor([2j, 1j]), r"sigmas \(2,\) of torch.complex64: give"),
        "bool": (torch.tensor([True, False]), r"sigmas \(2,\) of torch.bool: give"),
        "rising": (torch.tensor([1.0, 2.0]), r"sigmas\[0\] and \[1\] are 1.0 and 2.0: sigmas must fall"),
        "level": (torch.tensor([2.0, 1.0, 1.0]), r"sigmas\[1\] and \[2\] are 1.0 and 1.0: sigmas must fall"),
        "below-0": (torch.tensor([2.0, 1.0, -0.5]), r"sigmas\[2\] is -0.5: give finite ones of 0 or more"),
        "inf": (torch.tensor([INF, 1.0, 0.0]), r"sigmas\[0\] is inf: give finite"),
        "nan": (torch.tensor([2.0, NAN, 0.0]), r"sigmas\[1\] is nan: give finite"),
    }.values(),
)
def test_sigmas_refused(sigmas, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(sigmas=sigmas)


def takes_one_more(denoise, x, sigmas, noise, more):
    yield from ()


def takes_three(denoise, x, sigmas):
    yield from ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sampler": "euler", "sampler_options": {"s_churn": "3"}},
            "s_churn='3': the sampler 'euler' takes a number, 0.0",
        ),
        ({"sampler": "euler", "sampler_options": {"s_churn": NAN}}, "s_churn=nan: the sampler 'euler' takes a number"),
        ({"sampler": "lms", "sampler_options": {"order": 2.5}}, "order=2.5: the sampler 'lms' takes a whole number, 4"),
        ({"sampler": "ddim", "sampler_options": {"eta": -1}}, "eta=-1: give a number from 0"),
        ({"sampler": "dpmpp_2m_sde", "sampler_options": {"eta": 5}}, "eta=5: give a number from 0"),
        ({"sampler": "DPM++ 2M SDE Heun", "sampler_options": {"eta": 5}}, "eta=5: give a number from 0"),
        ({"sampler": "euler_cfg_pp"}, r"guidance_scale=7.5: that of CFG\+\+ goes from 0 to 1"),
        ({"guidance": "cfg_pp"}, r"guidance_scale=7.5: that of CFG\+\+ goes from 0 to 1"),
        ({"guidance": "cfg_pp", "sampler": "euler_cfg_pp", "guidance_scale": 0.6}, "they do the same"),
        ({"guidance": "perp_neg", "guidance_options": {"negative_scale": "a"}}, "negative_scale='a': the guidance"),
        (
            {"sampler": takes_one_more},
            "missing a required argument: 'more'; it is called with denoise, x, sigmas, noise",
        ),
        ({"sampler": takes_three}, "too many positional arguments; it is called with denoise, x, sigmas, noise"),
        ({"sampler": int}, "give a generator function|it is called with denoise"),
        ({"sampler": dict}, "give a generator function|it is called with denoise"),
    ],
)
def test_samplers_and_their_options_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_unknown_keyword():
    with pytest.raises(TypeError, match=r"Settings.* unexpected keyword argument 'num_inference_steps'"):
        Settings("a", num_inference_steps=20)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prompt": ""},
        {"prompt": ("a", "b")},
        {"steps": 1},
        {"steps": 1000},
        {"steps": np.int64(20)},
        {"strength": 0},
        {"strength": 1},
        {"eta": 1.0, "sampler": "ddim"},
        {"guidance_scale": -2},
        {"guidance": lambda *eps, scale: eps[0]},
        {"guidance": lambda a, b, sigma, w=1: a},
        {"guidance": lambda a, b, sigma, **options: a, "guidance_options": {"w": 3}},
        {"guidance": partial(apg, eta=0.5), "guidance_options": {"momentum": -0.5}},
        {"guidance_interval": [0, INF]},
        {"sampler": euler},
        {"sampler": "EulerDiscreteScheduler"},
        {"sampler": "DDIM", "eta": 0.5},
        {"sigmas": torch.tensor([1.0, 0.5])},
        {"sigmas": torch.tensor([3, 2, 0])},
        {"image": PICTURE, "mask": PICTURE},
        {"latents": torch.zeros(1, 4, 16, 16), "mask": PICTURE},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"subseed": 2**64 - 1, "subseed_strength": 1},
        {"seed_resize_from": [64, 48]},
        {"tiling": "x"},
    ],
    ids=lambda settings: "-".join(settings) or "defaults",
)
def test_accepted(settings):
    Settings(**settings)


def test_texts_and_seeds_of_each_picture():
    s = Settings(["a", "b"], negative_prompt=["c", "d"], batch_size=2, seed=7)
    assert s.count == 4
    assert (s.texts, s.negative_texts, s.seeds) == (["a", "a", "b", "b"], ["c", "c", "d", "d"], [7, 8, 9, 10])
    s = Settings("a", negative_prompt="c", batch_size=2, seed=(5, 0))
    assert (s.texts, s.negative_texts, s.seeds) == (["a", "a"], ["c", "c"], [5, 0])


@pytest.mark.parametrize("seed", [[3, 8, 11], (3, 8, 11), np.array([3, 8, 11])], ids=["list", "tuple", "array"])
def test_a_list_of_seeds_says_how_many(seed):
    s = Settings("a", negative_prompt=["c"], seed=seed)
    assert (s.count, s.texts, s.negative_texts, s.seeds) == (3, ["a"] * 3, ["c"] * 3, [3, 8, 11])


def test_variations_share_the_seed():
    """And the subseed counts up, as in webui; lists are taken as they are, and strength 0 is no variation."""
    s = Settings("a", batch_size=3, seed=7, subseed=20, subseed_strength=0.1)
    assert (s.seeds, s.subseeds) == ([7, 7, 7], [20, 21, 22])
    s = Settings(["a", "b"], seed=(7, 9), subseed=np.array([4, 4]), subseed_strength=0.1)
    assert (s.seeds, s.subseeds) == ([7, 9], [4, 4])
    assert Settings("a", batch_size=3, seed=7, subseed=20).seeds == [7, 8, 9]
    assert Settings("a").subseeds == []


@pytest.mark.parametrize("seed", [np.int64(3), [np.int64(3)], np.array([3])], ids=["scalar", "list", "array"])
def test_seeds_of_numpy(seed):
    """They are Python's numbers afterwards, which do not overflow and which a generator takes."""
    assert Settings(seed=seed).seeds == [3] and type(Settings(seed=seed).seeds[0]) is int


@pytest.mark.parametrize(
    ("name", "meant"),
    [("num_inference_steps", "steps"), ("strengh", "strength"), ("mask_image", "mask"), ("generator", "seed")],
)
def test_names_of_others(name, meant):
    with pytest.raises(TypeError, match=f"^{name}= is no setting: did you mean {meant}=\\? There are prompt, "):
        check_names(["steps", name])
    with pytest.raises(TypeError, match=r"^zzz= is no setting: There are prompt, "):
        check_names(["zzz"])


def test_cannot_be_changed_unchecked():
    with pytest.raises(AttributeError):
        Settings().steps = 0
