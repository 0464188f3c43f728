"""Guidance functions: beside diffusers and the published formulas, on paper, and in whole runs of the pipeline."""

from functools import cache, partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from family import MODELS, ZERO_SNR, assert_close, ours, photo, reference, saved, sd
from PIL import Image

import ldm
from ldm.guidance import (
    GUIDANCES,
    apg,
    bound,
    cfg,
    cfg_pp,
    dynamic_thresholding,
    guided,
    next_of,
    only_between,
    perp_neg,
)
from ldm.pipeline import DEFAULT_MODEL
from ldm.run import inpaints
from ldm.samplers import Prediction, Schedule, ddim, euler, euler_cfg_pp, net_denoiser

SIGMA = torch.tensor(3.0, dtype=torch.float64)
CAT, RED = "a cat", "the red"
SIGMAS = Schedule().sigmas(10)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, EPS_COND, EPS_UNCOND, EPS_EMPTY = normal(4, 3, 4, 8, 6)
X = X * 3


def assert_equal(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def dot(a, b):
    return (a.double() * b.double()).sum((1, 2, 3))


# ------------------------------------------------------------------------------------------------ functions


@pytest.mark.parametrize("sigma", [0.03, 3.0, 14.6])
def test_scale_1_is_the_prompt_alone(sigma):
    """By definition; not that of cfg_pp, which goes on without the prompt, nor of perp_neg, which still leads away."""
    sigma, common = torch.tensor(sigma, dtype=torch.float64), {"x": X, "scale": 1.0}
    assert_equal(cfg(EPS_COND, EPS_UNCOND, sigma, scale=1.0), EPS_COND)
    assert_equal(dynamic_thresholding(EPS_COND, EPS_UNCOND, sigma, **common), EPS_COND)
    for options in ({}, {"eta": 0.5, "norm_threshold": 5.0, "momentum": -0.5}):
        memory = {"update": X}
        assert torch.equal(apg(EPS_COND, EPS_UNCOND, sigma, **common, **options, memory=memory), EPS_COND)
    assert_equal(perp_neg(EPS_COND, EPS_UNCOND, sigma, scale=1.0, eps_empty=EPS_EMPTY, negative_scale=0), EPS_COND)


class TestAPG:
    OPTIONS = (
        {"eta": 0.0},
        {"eta": 1.0, "norm_threshold": 15.0},
        {"eta": 0.3, "momentum": -0.75},
        {"eta": 0.5, "norm_threshold": 20.0, "momentum": -0.5},
    )

    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("scale", [0.0, 7.5, 15.0])
    def test_diffusers(self, scale, options):
        """Ten steps of one run; theirs is given x0 and the scale of the paper, which counts from the prompt."""
        memory, buffer = {}, MomentumBuffer(options.get("momentum", 0.0))
        rest = options.get("eta"), options.get("norm_threshold", 0.0)
        for i, sigma in enumerate(SIGMAS[:-1]):
            cond, uncond = normal(2, 3, 4, 8, 6, seed=i)
            eps = apg(cond, uncond, sigma, x=X, scale=scale, memory=memory, **options)
            x0 = normalized_guidance(X - sigma * cond, X - sigma * uncond, scale - 1, buffer, *rest, True)
            assert_equal(X - sigma * eps, x0)

    def test_what_diffusers_does_by_default(self):
        """Its guider counts the scale from the negative prompt: the unconditional x0 and scale times the update, which
        is another point unless the update is the whole difference; and it is given what the net predicts, epsilon."""
        x0_cond, x0_uncond = X - SIGMA * EPS_COND, X - SIGMA * EPS_UNCOND
        options = {"eta": 0.3, "norm_threshold": 20.0}
        x0 = X - SIGMA * apg(EPS_COND, EPS_UNCOND, SIGMA, x=X, scale=7.5, memory={}, **options)
        update = (x0 - x0_cond) / 6.5
        guider = AdaptiveProjectedGuidance(7.5, adaptive_projected_guidance_rescale=20.0, eta=0.3)
        theirs = guider.forward(x0_cond, x0_uncond).pred
        assert_equal(theirs - x0, update - (x0_cond - x0_uncond), 1e-4)
        on_epsilon = normalized_guidance(EPS_COND, EPS_UNCOND, 6.5, None, 0.3, 20.0, True)
        assert (X - SIGMA * on_epsilon - x0).abs().max() > 0.1 * x0.abs().max()

    def test_eta_1_and_no_more_is_cfg(self):
        for sigma in SIGMAS[:-1]:
            eps = apg(EPS_COND, EPS_UNCOND, sigma, x=X, scale=7.5, memory={}, eta=1.0)
            assert_equal(eps, cfg(EPS_COND, EPS_UNCOND, sigma, scale=7.5))

    def test_eta_0_is_perpendicular_to_x0(self):
        x0_cond = X - SIGMA * EPS_COND
        for eta, share in ((0.0, 0.0), (0.5, 0.5)):
            eps = apg(EPS_COND, EPS_UNCOND, SIGMA, x=X, scale=7.5, memory={}, eta=eta)
            plain = cfg(EPS_COND, EPS_UNCOND, SIGMA, scale=7.5)
            along, whole = dot(eps - EPS_COND, x0_cond), dot(plain - EPS_COND, x0_cond)
            assert (along - share * whole).abs().max() <= 1e-5 * whole.abs().max()

    def test_the_threshold_is_the_length_of_the_update(self):
        for threshold in (1.0, 20.0):
            eps = apg(EPS_COND, EPS_UNCOND, SIGMA, x=X, scale=2.0, memory={}, eta=1.0, norm_threshold=threshold)
            norms = dot(eps - EPS_COND, eps - EPS_COND) ** 0.5 * SIGMA
            assert torch.allclose(norms, torch.full_like(norms, threshold))

    def test_pictures_by_themselves(self):
        options = {"scale": 7.5, "norm_threshold": 20.0, "momentum": -0.5}
        together, alone = {}, {}
        for cond, uncond in ((EPS_COND, EPS_UNCOND), (EPS_UNCOND, EPS_EMPTY)):
            eps = apg(cond, uncond, SIGMA, x=X, memory=together, **options)
            first = apg(cond[:1], uncond[:1], SIGMA, x=X[:1], memory=alone, **options)
            assert_equal(eps[:1], first, 1e-6)


class TestPerpNeg:
    @pytest.mark.parametrize(("scale", "negative_scale"), [(7.5, 1.0), (4.0, 2.5), (1.0, 0.0)])
    def test_the_published_formula(self, scale, negative_scale):
        """Written once more in numpy, in float64 and picture by picture."""
        eps = perp_neg(EPS_COND, EPS_UNCOND, SIGMA, scale=scale, eps_empty=EPS_EMPTY, negative_scale=negative_scale)
        for row, *three in zip(eps, EPS_COND, EPS_UNCOND, EPS_EMPTY, strict=True):
            cond, uncond, empty = (np.asarray(e, np.float64).ravel() for e in three)
            positive, negative = cond - empty, uncond - empty
            cosine = positive @ negative / np.sqrt((positive @ positive) * (negative @ negative))
            share = cosine * np.linalg.norm(negative) / np.linalg.norm(positive)
            expected = empty + scale * positive - scale * negative_scale * (negative - share * positive)
            assert np.abs(row.numpy().ravel() - expected).max() <= 1e-5 * np.abs(expected).max()

    def test_what_it_leads_away_from_is_perpendicular_to_the_prompt(self):
        positive = EPS_COND - EPS_EMPTY
        with_negative, without = (
            perp_neg(EPS_COND, EPS_UNCOND, SIGMA, scale=7.5, eps_empty=EPS_EMPTY, negative_scale=n) for n in (1.0, 0.0)
        )
        away = with_negative - without
        assert away.abs().max() > 1
        cosines = dot(away, positive) / (dot(away, away) * dot(positive, positive)) ** 0.5
        assert cosines.abs().max() <= 1e-6

    def test_without_a_negative_prompt_it_is_cfg(self):
        eps = perp_neg(EPS_COND, EPS_EMPTY, SIGMA, scale=7.5, eps_empty=EPS_EMPTY)
        assert torch.equal(eps, cfg(EPS_COND, EPS_EMPTY, SIGMA, scale=7.5))

    def test_an_empty_prompt_has_no_direction(self):
        eps = perp_neg(EPS_EMPTY, EPS_UNCOND, SIGMA, scale=7.5, eps_empty=EPS_EMPTY)
        assert_equal(eps, EPS_EMPTY - 7.5 * (EPS_UNCOND - EPS_EMPTY))

    def test_comfyui_projects_the_whole_batch(self):
        """One picture is the same there; of several, each depends on the others."""

        def comfy(cond, uncond, empty):
            positive, negative = (cond - empty).double(), (uncond - empty).double()
            share = (negative * positive).sum() / (positive**2).sum()
            return empty + 7.5 * (positive - (negative - share * positive))

        three = EPS_COND, EPS_UNCOND, EPS_EMPTY
        eps = perp_neg(*three[:2], SIGMA, scale=7.5, eps_empty=EPS_EMPTY)
        assert_equal(eps[:1].double(), comfy(*(e[:1] for e in three)))
        assert (eps - comfy(*three)).abs().max() > 0.1


class TestDynamicThresholding:
    @pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
    @pytest.mark.parametrize("scale", [1.0, 7.5])
    def test_diffusers(self, percentile, scale):
        """With Imagen's limit of 1; and where no pixel is beyond it, nothing changes."""
        theirs = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=torch.inf)
        for size in (1.0, 0.001):
            x, cond, uncond = size * X, size * EPS_COND, size * EPS_UNCOND
            options = {"scale": scale, "percentile": percentile, "limit": 1.0}
            eps = dynamic_thresholding(cond, uncond, SIGMA, x=x, **options)
            plain = x - SIGMA * cfg(cond, uncond, SIGMA, scale=scale)
            assert_equal(x - SIGMA * eps, theirs._threshold_sample(plain))
            assert torch.equal(x - SIGMA * eps, plain) == (size == 0.001)

    def test_what_diffusers_does_by_default(self):
        """Its sample_max_value of 1 leaves no s but 1, which is static clipping."""
        theirs = DDIMScheduler(thresholding=True)._threshold_sample(X)
        assert torch.equal(theirs, X.clamp(-1, 1))

    def test_the_limit_of_the_prompt_alone(self):
        """Each channel keeps its mean, and nothing is farther from it than under the prompt alone."""
        x, scale = X + torch.tensor([3.0, 0.0, -2.0, 9.0])[:, None, None], 30.0
        plain = x - SIGMA * cfg(EPS_COND, EPS_UNCOND, SIGMA, scale=scale)
        x0 = x - SIGMA * dynamic_thresholding(EPS_COND, EPS_UNCOND, SIGMA, x=x, scale=scale, percentile=1.0)
        assert_equal(x0.mean((2, 3)), plain.mean((2, 3)))
        farthest, alone, before = (
            (z - z.mean((2, 3), keepdim=True)).abs().amax((1, 2, 3)) for z in (x0, x - SIGMA * EPS_COND, plain)
        )
        assert_equal(farthest, alone)
        assert (before > 5 * alone).all()

    def test_large_batches(self):
        """Of more values than torch.quantile takes."""
        x = torch.zeros(1, 1, 1, 1).expand(17, 1, 1000, 1000)
        assert dynamic_thresholding(x, x, SIGMA, x=x, scale=7.5, limit=1.0).shape == x.shape

    @pytest.mark.parametrize("options", [{"percentile": 1.1}, {"percentile": -0.1}, {"limit": 0.0}, {"limit": -1.0}])
    def test_refused(self, options):
        (name, value), *_ = options.items()
        with pytest.raises(ValueError, match=f"{name}={value}: give a number"):
            dynamic_thresholding(EPS_COND, EPS_UNCOND, SIGMA, x=X, scale=7.5, **options)


# ------------------------------------------------------------------------------------------------ denoisers


GAUSSIANS = {"empty": (0.4, 1.2), "negative": (-1.0, 0.7), "prompt": (1.5, 0.4)}  # mean and standard deviation


def texts(x, sigma, names=tuple(GAUSSIANS)):
    """What a net is under as many texts, in closed form: x0 of Gaussian data, another for each part of the batch."""
    parts = zip(x.chunk(len(names)), (GAUSSIANS[name] for name in names), strict=True)
    x0 = torch.cat([(std**2 * part + sigma**2 * mean) / (std**2 + sigma**2) for part, (mean, std) in parts])
    return Prediction(x0, (x - x0) / sigma)


two_texts = partial(texts, names=("negative", "prompt"))


def test_rescale():
    """Composes with any guidance: the net's guided output gets the deviation that it has under the prompt."""
    for v in (False, True):
        net = net_denoiser(
            lambda *_: torch.cat([EPS_UNCOND, EPS_COND]), torch.zeros(1), Schedule(), ("epsilon", "v_prediction")[v]
        )
        for function in (cfg, apg, dynamic_thresholding):
            for rescale in (0.0, 0.7, 1.0):
                prediction, plain = (
                    guided(net, 7.5, r, v, bound(function, {}, SIGMAS))(X, SIGMA) for r in (rescale, 0.0)
                )
                # epsilon and x0 as v: sqrt(a) eps - sqrt(1 - a) x0
                c, d = (1 / 10**0.5, 3 / 10**0.5) if v else (1, 0)
                expected = c * plain.eps - d * plain.x0
                if rescale:
                    expected = rescale_noise_cfg(expected, EPS_COND, rescale)
                assert_equal(c * prediction.eps - d * prediction.x0, expected)
                assert_equal(prediction.x0 + SIGMA * prediction.eps, X)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("sampler", [euler, ddim])
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_pp_is_the_sampler(sampler, steps, scale):
    """Step by step, in closed form; down to 0, to a sigma above it, and with Euler's method up again."""
    down = Schedule().sigmas(steps)
    for sigmas in (down, torch.cat([down[:-1], down[-2:-1] / 2]), *[down[:-1].flip(0)] * (sampler is euler)):
        x = normal(2, 4, 8, 6) * sigmas[0]
        ours = sampler(guided(two_texts, scale, guide=bound(cfg_pp, {}, sigmas)), x, sigmas, None)
        theirs = euler_cfg_pp(guided(two_texts, scale), x, sigmas, None)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a.x, b.x)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.2, 0.7), (0.5, 0.5), (0.9, 1.0)])
def test_interval(start, stop):
    """As diffusers' guider with the same steps: it counts these, we name their sigmas."""
    guider = ClassifierFreeGuidance(7.5, start=start, stop=stop)
    first, last = int(start * 10), int(stop * 10)
    interval = float(SIGMAS[last]), float(SIGMAS[first])
    rows = []

    def alone(x, sigma):
        rows.append(len(x))
        return texts(x, sigma, names=("prompt",))

    x = normal(3, 4, 8, 6) * SIGMAS[0]
    denoise = only_between(guided(two_texts, 7.5), alone, *interval)
    for step in euler(denoise, x, SIGMAS, None):
        both = two_texts(torch.cat([x, x]), step.sigma).eps.chunk(2)
        guider.set_state(step.i, 10, None)
        x = x + (step.sigma_next - step.sigma) * guider.forward(both[1], both[0]).pred
        assert_equal(step.x, x)
        assert (step.eps_cond is None) == (step.eps_uncond is None) == (not first <= step.i < last)
    assert rows == [3] * (10 - (last - first))


# ------------------------------------------------------------------------------------------------ what it is given


def test_a_function_is_given_what_it_names():
    given = []

    def everything(eps_cond, eps_uncond, sigma, x, scale, *, eps_empty, sigma_next, sigmas, memory, w=1, **rest):
        given.append((eps_cond, eps_uncond, sigma, x, scale, eps_empty, sigma_next, sigmas, memory, w, rest))
        return eps_cond

    guide = bound(everything, {"w": 2, "u": 3}, SIGMAS)
    denoise = guided(texts, 7.5, guide=guide, parts=3)
    empty, uncond, cond = texts(torch.cat([X] * 3), SIGMAS[4]).eps.chunk(3)
    for _ in range(2):
        prediction = denoise(X, SIGMAS[4])
    first, second = given
    assert all(torch.equal(a, b) for a, b in zip(first[:4], (cond, uncond, SIGMAS[4], X), strict=True))
    assert first[4] == 7.5 and torch.equal(first[5], empty) and first[6] == SIGMAS[5]
    assert first[7] is SIGMAS and first[9:] == (2, {"u": 3})
    assert first[8] == {} and first[8] is second[8]
    assert torch.equal(prediction.eps, cond) and torch.equal(prediction.eps_cond, cond)
    assert torch.equal(prediction.eps_uncond, uncond) and torch.equal(prediction.x0, X - SIGMAS[4] * cond)


def test_names_that_are_the_functions_own():
    """The first three parameters, however they are called; and what a partial has settled."""
    for function, expected in (
        (lambda x, memory, scale: x + 0 * memory, EPS_COND),
        (lambda *eps, scale: scale * eps[0], 7.5 * EPS_COND),
        (partial(cfg, scale=2.0), cfg(EPS_COND, EPS_UNCOND, SIGMA, scale=2.0)),
        (lambda cond, uncond, sigma: uncond.double(), EPS_UNCOND),
    ):
        both = Prediction(None, torch.cat([EPS_UNCOND, EPS_COND]))
        eps = bound(function, {}, SIGMAS)(both, X, SIGMA, 7.5)
        assert torch.equal(eps, expected) and eps.dtype == torch.float32


def test_without_a_third_text_the_second_is_the_empty_one():
    both = Prediction(None, torch.cat([EPS_UNCOND, EPS_COND]))
    eps = bound(lambda cond, uncond, sigma, eps_empty: eps_empty, {}, SIGMAS)(both, X, SIGMA, 7.5)
    assert torch.equal(eps, EPS_UNCOND)


def test_next_sigma():
    down = torch.tensor([9.0, 4.0, 1.0, 0.5], dtype=torch.float64)
    for sigma, expected in ((9, 4), (4, 1), (4 + 1e-7, 1), (4 - 1e-7, 1), (5, 4), (99, 9), (0.5, 0)):
        assert next_of(torch.tensor(sigma, dtype=torch.float64), down) == expected
    for sigma, expected in ((0.5, 1), (4, 9), (4 + 1e-7, 9), (3, 4), (9, 0)):
        assert next_of(torch.tensor(sigma, dtype=torch.float64), down.flip(0)) == expected


@pytest.mark.parametrize(
    ("returned", "got"),
    [(None, "a NoneType"), (3.0, "a float"), (X[:1], r"shape \(1, 4, 8, 6\)"), (X[0], r"shape \(4, 8, 6\)")],
)
def test_what_it_returns(returned, got):
    def odd(eps_cond, eps_uncond, sigma):
        return returned

    message = rf"guidance 'odd' returned {got} at sigma=3\.0000: return the noise, .* of eps_cond, \(3, 4, 8, 6\)"
    with pytest.raises(ValueError, match=message):
        guided(two_texts, 7.5, guide=bound(odd, {}, SIGMAS))(X, SIGMA)


# ------------------------------------------------------------------------------------------------ pipeline


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


@pytest.fixture
def calls(pipe):
    """The number of rows of each batch that the UNet is given."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda net, inputs: rows.append(len(inputs[0])))
    yield rows
    hook.remove()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    @cache
    def make(kind):
        return saved(reference(MODELS[kind], EulerDiscreteScheduler), tmp_path_factory.mktemp("guided") / "model")

    return make


def only_cond(eps_cond, eps_uncond, sigma):
    return eps_cond


def only_uncond(eps_cond, eps_uncond, sigma):
    return eps_uncond


def only_empty(eps_cond, eps_uncond, sigma, eps_empty):
    return eps_empty


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 4),
        ({"guidance_scale": 1}, 2),
        ({"guidance": "cfg", "guidance_scale": 1}, 2),
        ({"guidance": "apg"}, 4),
        ({"guidance": "apg", "guidance_scale": 1}, 4),
        ({"guidance": only_cond, "guidance_scale": 1}, 4),
        ({"guidance": "perp_neg"}, 4),
        ({"guidance": "perp_neg", "negative_prompt": ""}, 4),
        ({"guidance": "perp_neg", "negative_prompt": RED}, 6),
        ({"guidance": "perp_neg", "negative_prompt": [RED, ""]}, 6),
    ],
)
def test_rows(pipe, calls, settings, rows):
    """Nothing is evaluated twice, and nothing that the guidance does not look at."""
    pipe([CAT, RED], steps=2, progress=False, **settings)
    assert calls == [rows] * 2


class TestInterval:
    def test_half_of_the_batch_outside(self, pipe, calls):
        sigmas = pipe.schedule.sigmas(6)
        interval = float(sigmas[4]), float(sigmas[1])
        pipe([CAT, RED], steps=6, guidance_interval=interval, progress=False)
        assert calls == [2, 4, 4, 4, 2, 2]
        calls.clear()
        pipe(CAT, negative_prompt=RED, steps=6, guidance="perp_neg", guidance_interval=interval, progress=False)
        assert calls == [1, 3, 3, 3, 1, 1]

    def test_everywhere_and_nowhere(self, pipe):
        settings = {"prompt": CAT, "negative_prompt": RED, "steps": 3}
        everywhere = ours(pipe, **settings, guidance_interval=(0, torch.inf), guidance_rescale=0.3)
        assert torch.equal(everywhere, ours(pipe, **settings, guidance_rescale=0.3))
        nowhere = ours(pipe, **settings, guidance_interval=(1e-9, 2e-9), guidance="apg")
        assert torch.equal(nowhere, ours(pipe, **settings, guidance_scale=1))

    def test_with_any_guidance(self, pipe):
        """Above the interval the prompt alone, below it the steps of a run that starts there."""
        sigmas = pipe.schedule.sigmas(4)
        settings = {"prompt": CAT, "negative_prompt": RED, "sampler": "euler"}
        interval = float(sigmas[-1]), float(sigmas[2])
        for guidance in GUIDANCES:
            scale = 0.6 if guidance == "cfg_pp" else 7.5
            own = {"guidance": guidance, "guidance_scale": scale, "guidance_interval": interval}
            steps = list(pipe.stream(**settings, **own, sigmas=sigmas))
            for step, alone in zip(steps[:2], pipe.stream(**settings, guidance_scale=1, sigmas=sigmas), strict=False):
                assert torch.equal(step.x, alone.x)
            rest = pipe.stream(
                **settings, guidance=guidance, guidance_scale=scale, sigmas=sigmas[2:], noise=steps[1].x / sigmas[2]
            )
            assert_equal(steps[-1].x, list(rest)[-1].x, 1e-4)


class TestCFG:
    @pytest.mark.parametrize("kind", ["SD 2", "SD 2 v"])
    def test_as_a_function(self, made, kind):
        """The user's own is the same as the built-in, whatever the net predicts."""
        settings = {"prompt": CAT, "negative_prompt": RED, "guidance_rescale": 0.5}
        plain = ours(made(kind), guidance_scale=5, **settings)
        mine = ours(made(kind), guidance=lambda cond, uncond, sigma: uncond + 5 * (cond - uncond), **settings)
        assert_equal(mine, plain, 1e-4)

    def test_at_zero_terminal_snr(self, tmp_path):
        """From the sigma of 4096, at which x0 is made of the net's own output."""
        pipe = saved(sd(ZERO_SNR), tmp_path)
        assert pipe.schedule.sigma_max > 4000
        for sampler in ("ddim", "euler"):
            plain, mine = (
                ours(pipe, prompt=CAT, negative_prompt=RED, sampler=sampler, guidance=guidance)
                for guidance in ("cfg", partial(cfg, scale=7.5))
            )
            assert_close(mine, plain)

    def test_by_its_name(self, pipe):
        assert torch.equal(*(ours(pipe, prompt=CAT, steps=2, **s) for s in ({}, {"guidance": "cfg"})))


def test_cfg_pp_is_the_sampler_in_whole_runs(pipe):
    settings = {"prompt": CAT, "negative_prompt": RED, "guidance_scale": 0.6, "steps": 7}
    for more in ({}, {"image": photo(64, 48), "strength": 0.6}, {"sigmas": "karras"}):
        expected = ours(pipe, sampler="euler_cfg_pp", **settings, **more)
        assert_equal(ours(pipe, sampler="euler", guidance="cfg_pp", **settings, **more), expected)
    # ddim starts and ends in its own way unless the sigmas say
    sigmas = pipe.schedule.sigmas(7)
    noise = normal(1, 4, 8, 8)
    common = settings | {"sigmas": sigmas, "latents": torch.zeros(1, 4, 8, 8), "noise": noise, "strength": 0.7}
    expected = ours(pipe, sampler="euler_cfg_pp", **common)
    assert_equal(ours(pipe, sampler="ddim", guidance="cfg_pp", **common), expected)


@pytest.mark.parametrize("kind", ["SD 2 v", "SD 1 inpainting", "SDXL", "refiner"])
class TestModels:
    def test_each_part_is_what_it_says(self, made, kind):
        """A guidance of one of the three alone is the run of that one alone; for two different pictures."""
        pipe = made(kind)
        settings = {"prompt": [CAT, RED], "seed": [3, 4], "image": photo(), "strength": 0.8, "steps": 2}
        if inpaints(pipe):
            settings["mask"] = Image.new("L", photo().size, 255)
        negative = {"negative_prompt": [RED, "a cat"]}
        empty = ours(pipe, **settings, **negative, guidance=only_empty)
        assert_close(empty, ours(pipe, **settings, guidance_scale=0))
        for function, scale in ((only_cond, 1), (only_uncond, 0)):
            expected = ours(pipe, **settings, **negative, guidance_scale=scale)
            assert (expected - empty).abs().max() > 0.01  # that they differ can be seen
            assert_close(ours(pipe, **settings, **negative, guidance=function), expected)

    def test_a_picture_does_not_depend_on_its_batch(self, made, kind):
        assert_independent(made(kind), "perp_neg")


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_a_picture_does_not_depend_on_its_batch(made, guidance):
    options = {"norm_threshold": 5.0, "momentum": -0.5} if guidance == "apg" else {}
    assert_independent(made("SD 2 v"), guidance, guidance_options=options)


def assert_independent(pipe, guidance, **options):
    settings = {"steps": 3, "guidance": guidance, "guidance_interval": (0.2, 12.0), "guidance_scale": 0.8, **options}
    batch = ours(pipe, [3, 4], prompt=[CAT, RED], negative_prompt=[RED, ""], **settings)
    for row, seed, prompt, negative in zip(batch, (3, 4), (CAT, RED), (RED, ""), strict=True):
        assert_close(row[None], ours(pipe, seed, prompt=prompt, negative_prompt=negative, **settings))


class TestMemory:
    """A run has one, and no other has it."""

    @pytest.fixture
    def seen(self):
        return []

    @pytest.fixture
    def remembers(self, seen):
        def function(eps_cond, eps_uncond, sigma, memory, sigmas):
            memory.setdefault("sigmas", []).append(float(sigma))
            if len(memory["sigmas"]) == 1:
                seen.append((memory["sigmas"], sigmas))
            return eps_cond

        return function

    def test_of_a_run(self, pipe, seen, remembers):
        for _ in range(2):
            ours(pipe, prompt=CAT, steps=3, guidance=remembers)
            assert len(list(pipe.stream(CAT, steps=3, guidance=remembers))) == 3
        assert [values for values, _ in seen] == [pipe.schedule.sigmas(3)[:-1].tolist()] * 4

    def test_of_edits(self, pipe, seen, remembers):
        common = {"steps": 4, "guidance": remembers, "progress": False}
        pipe(CAT, image=photo(96, 64), tile=64, tile_overlap=32, strength=0.5, **common)
        assert [len(values) for values, _ in seen] == [2, 2]
        assert all(torch.equal(sigmas, pipe.schedule.sigmas(4)[2:]) for _, sigmas in seen)
        seen.clear()
        pipe(CAT, width=32, height=32, enlarge=2, strength=0.25, **common)
        assert [len(values) for values, _ in seen] == [4, 1]
        seen.clear()
        pipe(CAT, image=photo(64, 64), extend=(0, 0, 32, 0), tile=64, strength=0.5, **common)
        assert [len(values) for values, _ in seen] == [2]

    def test_of_a_refined_run(self, made, seen, remembers):
        """One, to its end."""
        refiner = made("refiner")
        ours(made("SDXL"), prompt=CAT, steps=4, refiner=refiner, refiner_start=0.5, guidance=remembers)
        assert [len(values) for values, _ in seen] == [4]

    def test_momentum_ends_with_the_run(self, pipe):
        settings = {"prompt": CAT, "steps": 4, "guidance": "apg", "guidance_options": {"momentum": -0.75}}
        first, second = (ours(pipe, **settings) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.allclose(first, ours(pipe, **(settings | {"guidance_options": {}})), atol=0.01)


def test_the_refiner_is_guided_too(made):
    """With what it is shown without a negative prompt, which is no zeros there."""
    settings = {"prompt": CAT, "negative_prompt": RED, "steps": 4, "refiner": made("refiner"), "refiner_start": 0.5}
    for function, plain in (
        (only_empty, {"guidance_scale": 0, "negative_prompt": None}),
        (only_uncond, {"guidance_scale": 0}),
        (only_cond, {"guidance_scale": 1}),
    ):
        assert_close(ours(made("SDXL"), **settings, guidance=function), ours(made("SDXL"), **(settings | plain)))


def test_nan_is_named(pipe):
    def divides(eps_cond, eps_uncond, sigma):
        return eps_cond / (sigma > 5)

    sigma = float(next(s for s in pipe.schedule.sigmas(5) if s <= 5))
    with pytest.raises(FloatingPointError, match=f"guidance 'divides' returned NaN or infinity at sigma={sigma:.4f}"):
        ours(pipe, prompt=CAT, steps=5, guidance=divides)


def test_options_reach_the_function(pipe):
    settings = {"prompt": CAT, "steps": 3, "guidance": "apg"}
    by_option = ours(pipe, **settings, guidance_options={"eta": 1.0})
    assert_equal(by_option, ours(pipe, prompt=CAT, steps=3), 1e-4)
    assert_equal(by_option, ours(pipe, **(settings | {"guidance": partial(apg, eta=1.0)})), 1e-6)
    assert (by_option - ours(pipe, **settings)).abs().max() > 0.01


def test_tiles_and_the_hires_pass(pipe):
    for guidance in ("apg", "perp_neg"):
        common = {"guidance": guidance, "steps": 2, "strength": 0.5, "progress": False}
        tiled = pipe(CAT, negative_prompt=RED, image=photo(80, 64), tile=64, **common)
        assert tiled.images[0].size == (80, 64)
        assert pipe(CAT, negative_prompt=RED, enlarge=1.5, **common).images[0].size == (96, 96)


def test_a_refiner_that_is_the_same_model(pipe):
    settings = {"prompt": CAT, "negative_prompt": RED, "steps": 4, "guidance": "perp_neg"}
    refiner = ldm.Pipeline.from_pretrained(DEFAULT_MODEL)
    assert torch.equal(ours(pipe, **settings, refiner=refiner), ours(pipe, **settings))


def test_the_interval_is_open_below_and_closed_above():
    """low < sigma <= high, so that intervals that meet share no step."""
    both, alone = [], []
    denoise = only_between(
        lambda x, sigma: both.append(float(sigma)), lambda x, sigma: alone.append(float(sigma)), 1.0, 3.0
    )
    for sigma in (4.0, 3.0, 2.0, 1.0, 0.5):
        denoise(X, torch.tensor(sigma))
    assert both == [3.0, 2.0] and alone == [4.0, 1.0, 0.5]


def test_thresholding_takes_imagens_percentile():
    explicit = dynamic_thresholding(EPS_COND, EPS_UNCOND, SIGMA, x=X, scale=9.0, percentile=0.995)
    assert torch.equal(dynamic_thresholding(EPS_COND, EPS_UNCOND, SIGMA, x=X, scale=9.0), explicit)
    other = dynamic_thresholding(EPS_COND, EPS_UNCOND, SIGMA, x=X, scale=9.0, percentile=0.95)
    assert not torch.allclose(explicit, other, atol=1e-3)


@pytest.mark.parametrize("guidance", ["apg", "dynamic_thresholding"])
def test_at_sigma_0_it_is_cfg(guidance):
    """There x is x0, which no guidance moves; where a run backwards begins."""
    zero, given = torch.zeros(()).double(), {"x": X, "scale": 5.0} | ({"memory": {}} if guidance == "apg" else {})
    assert torch.equal(
        GUIDANCES[guidance](EPS_COND, EPS_UNCOND, zero, **given), cfg(EPS_COND, EPS_UNCOND, zero, scale=5.0)
    )
