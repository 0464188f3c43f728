import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from ldm.noise import SeededNoise

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
