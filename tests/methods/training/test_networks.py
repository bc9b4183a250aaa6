import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from elfs_ray.methods.training.networks import PROXY_MODELS, build_linear_model, build_proxy_model


@pytest.mark.parametrize("name", PROXY_MODELS)
@pytest.mark.parametrize("size", [8, 45])
def test_every_model_takes_any_size_and_trains_every_parameter(name, size):
    model = build_proxy_model(name, 7)
    logits = model(torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last))
    assert logits.shape == (2, 7)
    functional.cross_entropy(logits, torch.tensor([0, 6])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "million_multiply_adds", "million_parameters"),
    [
        ("small_cnn", 32, 11.2, 0.379),
        ("resnet18", 32, 556, 11.17),
        ("resnet18_imagenet", 224, 1814, 11.69 - 0.513 + 0.005),
        ("resnet34", 224, 3664, 21.80 - 0.513 + 0.005),
        ("resnet50", 224, 4089, 25.56 - 2.049 + 0.020),
    ],
)
def test_sizes_are_the_published_ones(name, size, million_multiply_adds, million_parameters):
    model = build_proxy_model(name, 10).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    assert counter.get_total_flops() / 2e6 == pytest.approx(million_multiply_adds, rel=0.01)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million_parameters, rel=0.005)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18"])
def test_one_seed_gives_one_network(name):
    networks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        networks.append(build_proxy_model(name, 5).state_dict())
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])
    assert any(not torch.equal(networks[0][key], networks[2][key]) for key in networks[0])


@pytest.mark.parametrize("name", ["small_cnn", "resnet18"])
def test_convolutions_start_with_the_variance_that_keeps_gradients_level(name):
    for module in build_proxy_model(name, 10).modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.12)


def test_the_small_network_learns_which_half_of_an_image_is_bright():
    torch.manual_seed(0)
    targets = torch.arange(64) % 2
    images = torch.rand(64, 3, 16, 16)
    images[targets == 0, :, :, :8] += 1
    images[targets == 1, :, :8, :] += 1
    model = build_proxy_model("small_cnn", 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(15):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
    assert (model(images).argmax(1) == targets).float().mean() > 0.95


def test_the_linear_model_learns_at_the_rate_of_networks_on_images():
    torch.manual_seed(0)
    targets = torch.arange(64) % 4
    embeddings = functional.normalize(torch.randn(64, 20) + 2 * functional.one_hot(targets, 20))
    losses = []
    for model in (build_linear_model(20, 4), nn.Linear(20, 4)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(15):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(embeddings), targets)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.3 < 0.9 < losses[1]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'resnet19'.*small_cnn.*resnet18.*resnet34.*resnet50"):
        build_proxy_model("resnet19", 10)
    with pytest.raises(ValueError, match="num_classes is 0"):
        build_proxy_model("small_cnn", 0)
