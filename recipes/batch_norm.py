"""GradInversion and what it knows of BatchNorm's statistics: those of the batch, the running ones, estimates from public images, none.

Shows:  batches of four cells under one small net with BatchNorm that trains by each batch's statistics (model.norm=keep), after the first round. The change of
        the running statistics, which clients send, tells the batch's own; a server that does not look at it has the running ones, an outsider public images.
Expect: tuned above naive and released; released above proxy and running, these above none, as far as the iterations suffice. Of a net whose statistics stand still, --model.norm frozen: nothing
        is released, the running ones of random weights tell nothing (they are left out), and public images still do.
Costs:  44 minutes of a CPU core beside other jobs with --evaluation.num-victims 16 --rounds.count 1, on real blood cells: released 13.2 dB [12.4, 14.1], proxy 13.1
        [12.2, 14.0], running 10.5 [9.8, 11.2], none 9.9 [9.6, 10.3], so that public images serve as well as what is released, and the statistics of one round little.
        (`tuned` is `released` with A0's own settings: `gidef attack RUN --attack naive statistics --iterations 400 --victims 16` on that run, 1.8 minutes: 14.8 dB
        [13.6, 15.9] over 4 batches, A0 10.6 [10.2, 10.9]; class mean 18.5. The same on runs of --small with --data.name cifar10 and pneumoniamnist: 14.6 [12.8, 15.6], A0 13.8
        [12.2, 15.4], class mean 13.6, and 16.6 [15.1, 18.6], A0 12.8 [12.2, 13.6], class mean 19.9.)
        (The other intervals are over single images, and too narrow: they were seen in 4 batches.)
        With 64 victims about four times as long; --small: about three minutes, with far too few iterations for a verdict.
"""

from dataclasses import replace

from torch import nn

from gidef.config import Data, Evaluation, GradInversion, LocalTraining, Model, NaiveMatching, Recipe, Rounds, StatisticsMatching, Undefended
from gidef.main import main


def net(*, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Three strided convolutions, each with BatchNorm."""
    widths = (image_shape[0], 32, 64, 64)
    blocks = [
        nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.LeakyReLU(0.1)) for before, after in zip(widths, widths[1:], strict=False)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


ATTACK = GradInversion(iterations=3000, restarts=4, langevin=0.0)  # without noise in the steps, as it was measured: what is known shows by itself
SHORT = replace(ATTACK, iterations=150, restarts=2)
KNOWN = ("released", "running", "proxy", "none")
RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="batch_norm:net", cut="1", norm="keep"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=10),
    defences={"undefended": Undefended()},
    attacks={**{name: replace(ATTACK, statistics=name) for name in KNOWN}, "naive": NaiveMatching(iterations=1000), "tuned": StatisticsMatching(iterations=1000)},
    evaluation=Evaluation(num_victims=64, batch_size=4, checkpoints=("early",)),
)
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=1), evaluation=Evaluation(num_victims=4, batch_size=4, checkpoints=("early",), judge_epochs=1),
    attacks={**{name: replace(SHORT, statistics=name) for name in KNOWN}, "naive": NaiveMatching(iterations=150), "tuned": StatisticsMatching(iterations=150)},
)  # fmt: skip

main(RECIPE, small=SMALL)
