"""Predictions with a client's noise and without it. Synthetic cells."""

import dataclasses

import torch

from gidef.config import IsotropicNoise
from gidef.evaluation import logits
from gidef.training import train
from tests.small_run import RECIPE, one_thread, start


def test_whoever_predicts_for_himself_needs_no_noise(tmp_path):
    with one_thread():
        found, plain = {}, {}
        for noisy in (True, False):
            recipe = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, noisy_prediction=noisy))
            run = start(recipe, tmp_path / str(noisy))
            trained = train(run, "isotropic", IsotropicNoise(std=5.0), 0)
            images, params = run.setting.dataset.test, trained.snapshots["final"].params
            found[noisy] = [logits(run, trained.training, params, images, seed=seed, split="test") for seed in (0, 1)]
            model = trained.training.participation.players[0].model
            with torch.no_grad():
                plain[noisy] = model(images.images.float() / 255)
        assert not torch.allclose(*found[True], atol=0.01) and torch.equal(*found[False])
        torch.testing.assert_close(found[False][0], plain[False])
        assert not torch.allclose(found[True][0], plain[True], atol=0.01)
        torch.testing.assert_close(plain[True], plain[False])  # the training is the same
