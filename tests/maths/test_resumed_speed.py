"""What of `speed` reaches the clients' steps, and what a resumed run takes over of it."""

import dataclasses
from types import SimpleNamespace

import pytest
from torch import nn

from gidef import build, config, job
from gidef.config import LAST_BITS, Recipe, Speed
from gidef.defence import Defence
from gidef.defence.bido import BiDODefence, BiDOSettings
from gidef.defence.compiled import Compiled
from gidef.errors import InputError
from gidef.models import SplitModel
from gidef.parallel import World


class Net(nn.Module):
    cuts = ("front",)

    def __init__(self):
        super().__init__()
        self.front, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Linear(144, 2)

    def forward(self, images):
        return self.head(self.front(images))


def split():
    return SplitModel(Net(), cut="front", image_shape=(3, 8, 8), num_classes=2)


def test_a_resumed_run_goes_on_with_what_decides_the_last_bits(tmp_path, capsys):
    began = Recipe(speed=Speed(threads=1, fused_optimisers=True, channels_last=True, reduction="float32", deterministic=True, timeout_s=60.0))
    job.write_recipe(began, "page", tmp_path)
    mine = Recipe(speed=Speed(threads=1, compile_training=True, workers=3), resume=True)
    resumed = job._continued(mine, tmp_path, World())
    assert [getattr(resumed.speed, name) for name in LAST_BITS] == [1, 1, True, True, True, False, "float32", True]
    assert (resumed.speed.workers, resumed.speed.timeout_s) == (3, mine.speed.timeout_s)  # only the seconds depend on these
    said = capsys.readouterr().err
    assert "speed.fused_optimisers=True" in said and "speed.compile_training=False" in said and "threads" not in said
    assert job._continued(dataclasses.replace(began, resume=True), tmp_path, World()) == dataclasses.replace(began, resume=True)
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match="speed.reduction=float32.*speed.shard_size"):
        job._continued(dataclasses.replace(mine, speed=Speed(shard_size=2)), tmp_path, World())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_players_are_compiled_where_they_can_be_and_the_others_said_so(accumulate):
    said, recipe = [], Recipe(clients=config.LocalTraining(accumulate=accumulate))
    for defence, compiled in ((Defence(split()), True), (BiDODefence(split(), BiDOSettings()), False)):
        players = [defence.player() for _ in range(2)]
        participation = SimpleNamespace(players=players, recorder=object(), moves_statistics=False)
        build.compile_steps(SimpleNamespace(participation=participation, defence=defence), recipe, notice=said.append)
        assert (participation.recorder is None) == compiled  # no thread records while another calls what torch.compile made
        assert all(isinstance(getattr(player, "_forward", None), Compiled) == compiled for player in players)
        assert len(said) == (0 if compiled else 1)
    assert "BiDODefence" in said[0]
