"""The affine augmentor: the figures of the released machinery, the identity, gradients."""

from __future__ import annotations

import pytest
import torch

from acam_kd.methods.parts.augmentor import AffineAugmentor, augmentor_objective


def test_official_figures(official):
    augmentor = AffineAugmentor()
    augmentor.draw = lambda count: official.wave((2, 6), 0.61, 0.4)
    theta = augmentor.bias + augmentor.std * augmentor.draw(2)
    expected = [1.0389419, 0.084683187, 0.099878974, 0.079048023, 1.0297041, -0.030354152]
    assert theta[0].tolist() == pytest.approx(expected, rel=1e-5)
    found = augmentor(official.wave((2, 3, 6, 10), 0.37, 0.1))
    assert found.sum().item() == pytest.approx(1.0234468, rel=1e-4)
    assert found.abs().sum().item() == pytest.approx(154.71487, rel=1e-5)
    assert found[0, 0, 2, 3].item() == pytest.approx(0.34351668, rel=1e-5)
    found.square().sum().backward()
    bias = [-25.027933, 4.5740662, -10.356149, -289.33972, 63.882286, -371.02112]
    std = [-5.7184572, 19.476387, -13.278210, -132.69659, 13.497996, -455.49097]
    assert augmentor.bias.grad.tolist() == pytest.approx(bias, rel=1e-3)
    assert augmentor.std.grad.tolist() == pytest.approx(std, rel=1e-3)


@pytest.mark.parametrize("colour", [False, True])
def test_the_identity_returns_the_images(colour):
    augmentor = AffineAugmentor(colour=colour)
    torch.nn.init.zeros_(augmentor.std)
    images = torch.rand(3, 3, 9, 7)
    assert torch.allclose(augmentor(images), images, atol=1e-5)


def test_each_image_has_its_own_draw():
    found = AffineAugmentor()(torch.rand(1, 3, 8, 8).expand(2, -1, -1, -1))
    assert not torch.allclose(found[0], found[1])


def test_colours_are_scaled_and_shifted_and_the_ground_stays():
    """The image is moved by half of its width; outside of it there is 0, the mean colour."""
    augmentor = AffineAugmentor(colour=True)
    torch.nn.init.zeros_(augmentor.std)
    with torch.no_grad():
        augmentor.bias[2] = 1.0
        augmentor.bias[6:] = torch.tensor([2.0, 1.0, 0.5, 0.25, 0.0, -1.0])
    found = augmentor(torch.ones(1, 3, 4, 8))
    assert found[0, :, 0, 0].tolist() == pytest.approx([2.25, 1.0, -0.5]) and found[..., -1].abs().max() == 0
    augmentor(torch.rand(2, 3, 4, 8)).square().sum().backward()
    assert (augmentor.bias.grad[6:] != 0).all() and (augmentor.std.grad[6:] == 0).sum() == 0


def test_processes_share_the_draws_of_one():
    images = torch.rand(6, 3, 8, 8)
    found = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(0)
        found.append(AffineAugmentor(rank=rank, world=world)(images[rank::world]))
    assert torch.equal(found[0][0::2], found[1]) and torch.equal(found[0][1::2], found[2])


def test_the_objective():
    assert augmentor_objective(torch.tensor(3.0), torch.tensor(2.0), 0.5).item() == 2.0
