"""How a client learns and what it lets out.

A defence is an object with the four members of `Defence`; `build` makes one from its dataclass. One of your own is a
dataclass, defined anywhere, with a method `build(make_model)`:

    @dataclass(frozen=True, kw_only=True)
    class LabelSmoothing:
        amount: float = 0.1

        def build(self, make_model):
            return SmoothedDefence(make_model(), amount=self.amount)

where `make_model(perturbation=None, cut=None)` returns the recipe's `SplitModel`, with the latent norm and a perturbation layer if
`perturbation` holds the keyword arguments of `gidef.models.Perturbation`; `cut` takes the place of the recipe's.
"""

from gidef.defence.base import Defence, Plain
from gidef.defence.perturbation import LearnedDefence
from gidef.defence.private import ClipAndNoise, PrivateDefence, PrivateNoise

__all__ = ["ClipAndNoise", "Defence", "LearnedDefence", "Plain", "PrivateDefence", "PrivateNoise"]
