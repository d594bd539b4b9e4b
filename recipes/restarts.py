"""What restarts buy an attacker, and what successive halving saves of their cost: blood cells, a net after five rounds.

Shows:  one start, eight starts, and eight of which the worse half stops at 1/8, 1/4 and 1/2 of the iterations, by the attacker's own loss.
        The verdict says what each form took and, with a paired interval over the victims, how far it is from eight full starts.
Expect: eight halved starts within some tenths of a dB of eight full ones, at a third of the iterations and half of the time.
Costs:  five minutes of one CPU core.
"""

from gidef.config import Data, Evaluation, LocalTraining, Model, NaiveMatching, Recipe, Rounds, Undefended
from gidef.main import main

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=5),
    defences={"undefended": Undefended()},
    attacks={
        "one start": NaiveMatching(iterations=400),
        "eight starts": NaiveMatching(iterations=400, restarts=8),
        "eight halved": NaiveMatching(iterations=400, restarts=8, halving=2),
    },
    evaluation=Evaluation(num_victims=8, checkpoints=("final",), judge_epochs=4),
)

main(RECIPE)
