import urllib.error

import pytest
import torch

from gidef.errors import InputError
from gidef.metrics.lpips import lpips_distance


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder in the place of PyTorch's download cache."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_absent_weights_say_which_file_is_missing_and_what_to_do(hub):
    with pytest.raises(InputError, match=r"checkpoints/alexnet-owt-\w+\.pth, which are absent.*download=True"):
        lpips_distance()
    with pytest.raises(InputError, match="choose one of alex, vgg, squeeze"):
        lpips_distance("resnet")


def test_a_download_that_fails_is_one_line(hub, monkeypatch):
    def refuse(*args, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(InputError, match="no route to host"):
        lpips_distance("squeeze", download=True)


def test_with_weights_in_place_it_takes_small_and_grey_images(hub):
    # Random weights stand in for ImageNet's: this shows that images get through, not what LPIPS is.
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    with torch.random.fork_rng(devices=[]):
        torch.save(squeezenet1_1(weights=None).state_dict(), hub / SqueezeNet1_1_Weights.DEFAULT.url.rsplit("/")[-1])
    before = torch.get_rng_state()
    distance = lpips_distance("squeeze")
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 1.5
    near = (x + 0.05 * torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    values = distance(near, x)
    assert values.shape == (3,) and (values > 0).all() and not values.requires_grad
    assert distance(x, x).tolist() == [0, 0, 0]
    torch.testing.assert_close(distance(near[:1], x[:1]), values[:1], atol=1e-5, rtol=1e-3)
