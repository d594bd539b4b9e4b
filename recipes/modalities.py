"""Other modalities (E3): one row per 2-D MedMNIST set that is on this machine. MedMNIST has no 2-D MRI.

Shows:  whether what holds for blood cells holds for X-rays, ultrasound, skin, fundus, CT, OCT and histology. PSNR is not comparable between sets of
        other contrast: read it against each row's class mean, or compare the NMSE of table.csv and report.html, the MSE over a set's own variance.
        ChestMNIST is left out: it has several labels per image, and gidef needs one class each.
Expect: the same order everywhere.
Costs:  half an hour a set on 2 CPU cores; --small: some minutes for all that is here. Sets that are missing are named, not downloaded.
"""

from dataclasses import replace

from gidef.config import (
    Data,
    Evaluation,
    IsotropicNoise,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    NaiveMatching,
    PostHocDecoder,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    Undefended,
)
from gidef.main import fail, speaks, sweep

SETS = {
    "bloodmnist": "microscopy of blood", "pathmnist": "histology of the colon", "tissuemnist": "microscopy of the kidney",
    "pneumoniamnist": "paediatric chest X-ray", "breastmnist": "breast ultrasound", "dermamnist": "dermatoscopy", "retinamnist": "fundus photographs",
    "octmnist": "retinal OCT", "organamnist": "abdominal CT, axial", "organcmnist": "abdominal CT, coronal", "organsmnist": "abdominal CT, sagittal",
}  # fmt: skip
RECIPE = Recipe(
    data=Data(num_clients=5, download=False),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=32, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=20),
    defences={"undefended": Undefended(), "isotropic": IsotropicNoise(), "learned": LearnedPerturbation()},
    attacks={"naive": NaiveMatching(iterations=1000), "joint": JointMatching(iterations=1000), "read-noise": ReadNoise(iterations=1000), "read-latent": ReadLatent(iterations=1000), "decoder": PostHocDecoder(steps=500)},
    evaluation=Evaluation(num_victims=32, checkpoints=("early",)),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), evaluation=Evaluation(num_victims=4, num_tuning=4, checkpoints=("final",), judge_epochs=1),
    attacks={"naive": NaiveMatching(iterations=80), "joint": JointMatching(iterations=80), "read-noise": ReadNoise(iterations=80), "read-latent": ReadLatent(iterations=80), "decoder": PostHocDecoder(steps=30)},
)  # fmt: skip


def here() -> list[str]:
    """Sets whose file is found; says which are not."""
    from gidef.data import find_local

    found = [name for name in SETS if find_local(name) is not None]
    if speaks() and len(found) < len(SETS):
        print("not here: " + ", ".join(f"{name} ({SETS[name]})" for name in SETS if name not in found), flush=True)
    return found or fail("none of MedMNIST's 2-D sets is here: gidef data download NAME brings one, or set GIDEF_DATA to the folder of their .npz files.")


def rows(recipe: Recipe, names: list[str]) -> dict[str, Recipe]:
    return {name: replace(recipe, data=replace(recipe.data, name=name)) for name in names}


if __name__ == "__main__":
    NAMES = here()
    sweep(rows(RECIPE, NAMES), small=rows(SMALL, NAMES))
