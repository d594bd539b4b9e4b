"""Who takes part, and how the server learns (E8): fractions of clients, local epochs, FedSGD, FedAvg, FedProx, FedAdam, FedYogi and FedAdagrad,
and clients that drop out of a round.

Shows:  accuracy, and what one client's gradient, or its local training on the same four images (one, two and four steps; two and five epochs), gives away; in the row "drop-outs" a share of every cohort leaves after
        masks of a secure sum were agreed, so that attackers see sums.
Expect: more local steps cost the attacker, not as much as they cost the naive one.
Costs:  hours on 2 CPU cores; --small: some minutes.
"""

from dataclasses import replace

from gidef.config import (
    Data,
    Evaluation,
    FedAdagrad,
    FedAdam,
    FedYogi,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    NaiveMatching,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    SecureAggregation,
    SingleGradient,
    SurrogateModel,
    Undefended,
)
from gidef.main import sweep

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=20),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=40),
    defences={"undefended": Undefended(), "learned": LearnedPerturbation()},
    attacks={"naive": NaiveMatching(iterations=1000), "joint": JointMatching(iterations=1000), "read-noise": ReadNoise(iterations=1000), "read-latent": ReadLatent(iterations=1000)},
    evaluation=Evaluation(num_victims=32, checkpoints=("early",)),
)
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2, cohort_size=4), evaluation=Evaluation(num_victims=4, checkpoints=("final",), judge_epochs=2),
    attacks={"naive": NaiveMatching(iterations=60), "joint": JointMatching(iterations=60), "read-noise": ReadNoise(iterations=60), "read-latent": ReadLatent(iterations=60)},
)  # fmt: skip


def delta(recipe: Recipe, steps: int, epochs: int = 1) -> Recipe:
    """What a client's local training on four images gives away, in so many steps an epoch."""
    attacks = {**recipe.attacks, "surrogate model": SurrogateModel(iterations=recipe.attacks["naive"].iterations)}
    return replace(recipe, attacks=attacks, evaluation=replace(recipe.evaluation, batch_size=4, release="delta", local_steps=steps, local_epochs=epochs))


def dropping(recipe: Recipe) -> Recipe:
    """A tenth or three tenths of a cohort drop out of every round."""
    sums = {f"{share:g} drop out": SecureAggregation(dropouts=share) for share in (0.0, 0.1, 0.3)}
    return replace(recipe, defences={"undefended": Undefended(), **sums, "learned + 0.3 drop out": (LearnedPerturbation(), SecureAggregation(dropouts=0.3))})


def rows(recipe: Recipe) -> dict[str, Recipe]:
    rounds, adam = recipe.rounds, recipe.clients
    return {
        **{f"fraction {share:g}": replace(recipe, rounds=replace(rounds, cohort_size=None, cohort_share=share)) for share in (0.05, 0.1, 0.3, 1.0)},
        **{f"{epochs} epochs": replace(recipe, clients=replace(adam, epochs=epochs)) for epochs in (2, 5)},
        "FedSGD": replace(recipe, clients=SingleGradient(batch_size=64, lr=0.1)),
        "FedProx": replace(recipe, clients=replace(adam, proximal=0.1)),
        **{type(server).__name__: replace(recipe, rounds=replace(rounds, server=server)) for server in (FedAdam(), FedYogi(), FedAdagrad())},
        "drop-outs": dropping(recipe),
        "gradient of 4": replace(recipe, evaluation=replace(recipe.evaluation, batch_size=4)),
        **{f"{steps} local step{'s' * (steps > 1)} on 4": delta(recipe, steps) for steps in (1, 2, 4)},
        **{f"{epochs} epochs of 4 steps": delta(recipe, 4, epochs) for epochs in (2, 5)},
    }


sweep(rows(RECIPE), small={name: row for name, row in rows(SMALL).items() if name in ("fraction 0.3", "FedSGD", "FedYogi", "4 local steps on 4")})
