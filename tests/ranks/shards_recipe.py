"""Two rounds of a small transformer against a decoder, and of its undefended twin; no attacks. For the tests of a client on several ranks."""

from torch import nn

from gidef.config import Data, Dirichlet, Evaluation, FedAvg, LearnedPerturbation, LocalTraining, Model, Recipe, Rounds, Undefended
from gidef.data import Dataset, synthetic_blood_cells
from gidef.main import main


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=90, val=33, test=33)


def transformer(*, num_classes: int, image_shape: tuple[int, ...], **_: object) -> nn.Module:
    """Tensors of odd sizes, and of one row, which two ranks share unevenly."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=image_shape[1:], patch_size=7, in_chans=image_shape[0], num_classes=num_classes, embed_dim=30, depth=3, num_heads=3, mlp_ratio=1.5
    )


RECIPE = Recipe(
    data=Data(name="shards_recipe:few_cells", num_clients=3, partition=Dirichlet(alpha=2.0), min_examples=8),
    model=Model(name="shards_recipe:transformer", cut="blocks.0"),
    clients=LocalTraining(batch_size=9, optimiser="adam", lr=1e-3, grad_clip=1.0),
    rounds=Rounds(count=2, cohort_size=2, server=FedAvg(momentum=0.5)),
    defences={"undefended": Undefended(), "learned": LearnedPerturbation(mean=True, ramp=0.0, decoder_steps_first=2)},
    evaluation=Evaluation(num_victims=8, num_tuning=0, judge_epochs=1),
)

main(RECIPE)
