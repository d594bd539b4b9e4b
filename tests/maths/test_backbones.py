"""Each promised backbone goes through the whole of a client's life at 32 pixels: split, train a step, be attacked, be decoded. Random images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gidef import attack, build, config
from gidef.clients.local import LocalSettings, train_locally
from gidef.rng import generator
from gidef.types import Client, Observation

BACKBONES = {
    "small": "blocks.1",
    "resnet18": "layer1",
    "resnet50": "layer1",
    "convnext_tiny": "stages.0",
    "vit_tiny_patch16_224": "blocks.2",
    "vit_small_patch16_224": "blocks.2",
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # PyTorch's, about pooling of channels-last maps under vmap
@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_splits_trains_a_step_and_is_attacked(name):
    torch.set_num_threads(1)
    recipe = config.Recipe(model=config.Model(name=name, cut=BACKBONES[name]))
    defence = build.make_defence(config.LearnedPerturbation(), recipe, build.Shape(4, (3, 32, 32)), seed=0)
    draws = generator(0, "images")
    client = Client(0, torch.randint(0, 256, (2, 3, 32, 32), generator=draws, dtype=torch.uint8), torch.tensor([1, 3]))

    player, start = defence.player(), defence.initial()
    model_start = {name: tensor for name, tensor in start.items() if not name.startswith("decoder.")}
    player.begin(client, seed=0, round=1, progress=1.0, first=False)
    result = train_locally(player, model_start, client, LocalSettings(batch_size=2, optimiser="sgd", lr=0.01), seed=0, round=1)
    moved = {part: sum(float(result.delta[n].abs().sum()) for n in defence.model.parts[part]) for part in ("encoder", "perturbation", "predictor")}
    assert all(torch.isfinite(tensor).all() for tensor in result.delta.values())
    assert min(moved.values()) > 0

    images, labels = client.images[:1].float() / 255, client.labels[:1]
    noise = defence.draw_noise(1, generator=generator(0, "noise"))
    known = {name: tensor for name, tensor in start.items() if name.startswith("decoder.")}
    update = defence.simulator(progress=1.0)()(model_start, known, images, F.one_hot(labels, 4).float(), noise)
    seen = Observation(model_start, {name: tensor.detach() for name, tensor in update.items()}, 1, labels=labels, known=known)
    matching = attack.Matching(image_shape=(3, 32, 32), num_classes=4, noise_shape=tuple(noise.shape), iterations=2)
    found = attack.run([seen], defence.simulator(progress=1.0), matching, seed=0)[0]
    assert found.status == "ok"
    assert found.losses[-1] < found.losses[0]

    with torch.no_grad():
        reconstruction = defence.decoder(defence.model.run(images, noise).perturbed)
    assert reconstruction.shape == images.shape
    assert float(reconstruction.min()) >= 0 and float(reconstruction.max()) <= 1
