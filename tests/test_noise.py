import math

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from ldm.noise import SeededNoise, in_the_middle, slerp

SEEDS = [0, 1, 42, 2**32 + 5, 2**63 - 1]


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 8, 6), (4, 5, 7), (3, 1, 1)])
def test_diffusers_draws(shape):
    """Bitwise, and so are the draws that follow."""
    noise = SeededNoise(SEEDS, shape)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    for _ in range(3):
        ours = noise()
        assert ours.dtype == torch.float32 and ours.shape == (len(SEEDS), *shape)
        assert torch.equal(ours, randn_tensor((len(SEEDS), *shape), generator=generators))


def test_a_picture_does_not_depend_on_its_batch():
    batch = SeededNoise([7, 8, 9], (4, 8, 8))
    alone = SeededNoise([8], (4, 8, 8))
    for _ in range(3):
        assert torch.equal(batch()[1], alone()[0])


def test_seeds_and_draws_differ():
    noise = SeededNoise([0, 1], (4, 8, 8))
    first, second = noise(), noise()
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert torch.equal(SeededNoise([5, 5], (4, 8, 8))()[0], SeededNoise([5], (4, 8, 8))()[0])


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    SeededNoise([0], (4, 8, 8))()
    assert torch.equal(torch.get_rng_state(), before)


def drawn(seed, *shape, count=1):
    """The last of `count` draws of a generator."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)][-1]


class TestSlerp:
    @pytest.mark.parametrize("strength", [0.01, 0.3, 0.5, 0.99])
    def test_each_column_turns_along_its_arc(self, strength):
        """webui's formula, one vector at a time and in double precision."""
        a, b = drawn(1, 4, 8, 6), drawn(2, 4, 8, 6)
        mixed = slerp(strength, a[None], b[None])[0]
        for channel in range(4):
            for column in range(6):
                u, v = a[channel, :, column].double(), b[channel, :, column].double()
                angle = math.acos(u @ v / (u.norm() * v.norm()))
                expected = math.sin((1 - strength) * angle) * u + math.sin(strength * angle) * v
                close = {"rtol": 0, "atol": 1e-5, "check_dtype": False}
                torch.testing.assert_close(mixed[channel, :, column], expected / math.sin(angle), **close)

    def test_ends_bitwise(self):
        a, b = drawn(1, 1, 4, 8, 6), drawn(2, 1, 4, 8, 6)
        assert torch.equal(slerp(0.0, a, b), a) and torch.equal(slerp(1.0, a, b), b)

    def test_stays_noise(self):
        """Where the straight line would lose half of the variance."""
        a, b = drawn(1, 1, 4, 128, 128), drawn(2, 1, 4, 128, 128)
        assert abs(slerp(0.5, a, b).var() - 1) < 0.02 and abs(torch.lerp(a, b, 0.5).var() - 0.5) < 0.02

    def test_without_an_arc(self):
        """The same noise stays as it is; one row of it, all of whose columns are parallel or opposite, stays finite."""
        a, b = drawn(1, 1, 4, 8, 6), drawn(2, 1, 4, 1, 6)
        assert torch.equal(slerp(0.3, a, a), a)
        assert torch.equal(slerp(0.3, a[:, :, :1], b), torch.lerp(a[:, :, :1], b, 0.3))


@pytest.mark.parametrize(
    ("full", "size", "start", "place", "length"),
    [(8, 8, 0, 0, 8), (8, 4, 0, 2, 4), (8, 5, 0, 1, 5), (4, 8, 2, 0, 4), (8, 11, 2, 0, 7), (5, 1, 0, 2, 1)],
)
def test_in_the_middle(full, size, start, place, length):
    """Along both sides: `length` values of the noise from `start` on, at `place`; all the rest is as it was."""
    for transposed in (False, True):
        noise, below = drawn(1, 1, 4, 6, size), drawn(2, 1, 4, 6, full)
        expected = below.clone()
        expected[..., place : place + length] = noise[..., start : start + length]
        if transposed:
            noise, below, expected = noise.mT, below.mT, expected.mT
        assert torch.equal(in_the_middle(noise, below), expected)


class TestVaried:
    SHAPE = (4, 8, 6)

    def test_nothing_varied_is_the_draw_bitwise(self):
        for varied in ((), ([5, 6], 0.0), ([], 0.0, (8, 6))):
            noise, plain = SeededNoise([3, 4], self.SHAPE), SeededNoise([3, 4], self.SHAPE)
            assert torch.equal(noise(), plain())
            assert torch.equal(noise.varied(*varied), plain())
            assert torch.equal(noise(), plain())

    @pytest.mark.parametrize("before", [0, 1])
    def test_mixed_with_the_same_draw_of_the_subseeds(self, before):
        noise, plain = SeededNoise([3, 3], self.SHAPE), SeededNoise([3, 3], self.SHAPE)
        for _ in range(before):
            assert torch.equal(noise(), plain())
        mixed = noise.varied([5, 6], 0.3)
        plain()
        for picture, subseed in zip(mixed, (5, 6), strict=True):
            a, b = (drawn(seed, *self.SHAPE, count=before + 1) for seed in (3, subseed))
            assert torch.equal(picture, slerp(0.3, a, b))
        assert torch.equal(noise(), plain())  # the seed's own again

    def test_size(self):
        """Mixed at the other size, around it the seed's noise at its own."""
        noise, plain = SeededNoise([3], self.SHAPE), SeededNoise([3], self.SHAPE)
        mixed = noise.varied([5], 0.3, (4, 8))
        expected = plain()
        expected[0, :, 2:6] = slerp(0.3, drawn(3, 4, 4, 8), drawn(5, 4, 4, 8))[:, :, 1:7]
        assert torch.equal(mixed, expected) and torch.equal(noise(), plain())
