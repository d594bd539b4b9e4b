"""Bits of an upload: each transformed tensor is written in so many of them and read back, and by hand."""

from __future__ import annotations

import dataclasses
import math
import struct
import types

import pytest
import torch

from gidef import build
from gidef.config import (
    DPSGD,
    Censor,
    Clipping,
    Evaluation,
    FedAvg,
    GradDefense,
    GradientNoise,
    LearnedPerturbation,
    LocalTraining,
    Model,
    Pruning,
    Quantisation,
    Rounds,
    Scaffold,
    SecureAggregation,
    Sign,
    Soteria,
    Undefended,
)
from gidef.defence.base import Defence
from gidef.defence.clipping import Clip
from gidef.defence.noise import AddNoise
from gidef.defence.pruning import Prune
from gidef.defence.quantisation import Quantise
from gidef.defence.sign import SignOnly
from gidef.defence.upload import Packed
from gidef.parallel import World
from gidef.rng import generator
from tests.small_run import RECIPE


def float32(value):
    return format(struct.unpack(">I", struct.pack(">f", float(value)))[0], "032b")


def as_float(text):
    return struct.unpack(">f", int(text, 2).to_bytes(4, "big"))[0]


class Values:
    """A code for the entries of a tensor: of bits, and a number beside them where there is one."""

    def __init__(self, tensor, bits, *, sparse):
        self.bits, self.sparse, self.levels = bits, sparse, 2 ** (bits - 1) - 1
        size = tensor.abs().max()
        self.head = "" if bits == 32 else float32(size)  # of the tests' tensors the largest entry is on the largest level, or the sign's

    def write(self, value):
        if self.bits == 32:
            return float32(value)
        if self.bits == 1:
            assert self.sparse or value != 0
            return "1" if value > 0 else "0"
        return format(round(float(value) / as_float(self.head) * self.levels) + self.levels, f"0{self.bits}b")

    def read(self, text):
        if self.bits == 32:
            return as_float(text)
        return as_float(self.head) * (2 * int(text) - 1 if self.bits == 1 else (int(text, 2) - self.levels) / self.levels)


def written_and_read(tensor, kept, bits):
    """The least number of bits of three plain ways to write a tensor, each of which is read back here."""
    n, code = len(tensor), Values(tensor, bits, sparse=kept < len(tensor))
    nonzero = tensor.nonzero().flatten().tolist()
    places = sorted([*nonzero, *(place for place in range(n) if place not in nonzero)][:kept])  # what quantisation rounds to 0 is sent all the same
    width, values = math.ceil(math.log2(n)) if n > 1 else 0, "".join(code.write(tensor[place]) for place in places)
    ways = []
    if kept == n:
        ways.append(values)
    else:
        ways.append("".join(format(place, f"0{width}b") * (width > 0) for place in places) + values)
        ways.append("".join("1" if place in places else "0" for place in range(n)) + values)
        if bits > 1:
            ways.append("".join(code.write(value) for value in tensor))
    for number, text in enumerate(ways):
        if kept == n or number == 2:
            where, rest = list(range(n)), text
        elif number == 0:
            where = [int(text[width * k : width * (k + 1)] or "0", 2) for k in range(kept)]
            rest = text[width * kept :]
        else:
            where, rest = [place for place in range(n) if text[place] == "1"], text[n:]
        again = torch.zeros(n)
        for k, place in enumerate(where):
            again[place] = code.read(rest[bits * k : bits * (k + 1)])
        torch.testing.assert_close(again, tensor, rtol=1e-5, atol=0)
    return min(map(len, ways)) + len(code.head)


@pytest.mark.parametrize(
    ("chosen", "bits"),
    [
        ((), 32), ((SignOnly(),), 1), ((Quantise(bits=2),), 2), ((Quantise(bits=5),), 5), ((Prune(share=0.9), Clip(bound=0.1)), 32), ((Prune(share=0.99),), 32), ((Prune(share=0.01),), 32),
        ((Prune(share=0.5), SignOnly()), 1), ((SignOnly(), Prune(share=0.95)), 1), ((Prune(share=0.3), Quantise(bits=3)), 3), ((Prune(share=0.9), Quantise(bits=6)), 6),
        ((Quantise(bits=4), SignOnly(), Clip(bound=0.1)), 1), ((Prune(share=0.9), AddNoise(std=0.1, relative=False)), 32), ((Prune(share=0.5), Prune(share=0.2)), 32),
    ],
)  # fmt: skip
def test_a_tensor_can_be_written_in_the_counted_bits_and_read_back(chosen, bits):
    for n in (1, 7, 64, 300):
        update = {"w": torch.randn(n, generator=generator(n))}
        packed = Packed.plain(n)
        for one in chosen:
            update, packed = one.apply(update, generator=generator(0, "draws")), one.packed(packed)
        if bits == 1 and packed.kept == n and not update["w"].all():
            continue  # signs of zeros, which quantisation makes of small entries, count like the others
        assert int((update["w"] != 0).sum()) <= packed.kept and packed.bits == bits
        assert packed.total == written_and_read(update["w"], packed.kept, bits)


@pytest.mark.parametrize(
    ("chosen", "bits"),
    [
        (Undefended(), 32_000), (Pruning(share=0.9), 3_200 + 1_000), (Pruning(share=0.99), 320 + 100), (Pruning(share=0.5), 16_000 + 1_000), (Pruning(share=0.01), 32_000),
        (Pruning(share=0.0), 32_000), (Sign(), 1_032), (Quantisation(bits=2), 2_032), (Quantisation(bits=16), 16_032), ((Pruning(share=0.99), Sign()), 10 + 100 + 32),
        ((Pruning(share=0.99), Quantisation(bits=8)), 80 + 100 + 32), ((Pruning(share=0.9), GradientNoise()), 32_000), ((Pruning(share=0.99), GradientNoise(std=0.0)), 420),
        ((Pruning(share=0.99), Clipping()), 420), ((Pruning(share=0.99), Soteria()), 420), ((Pruning(share=0.99), Censor()), 32_000), ((Sign(), GradDefense()), 32_000),
        (LearnedPerturbation(), 32_000), ((Sign(), SecureAggregation()), 64_000), ((Pruning(share=0.99), DPSGD(level="client")), 32_000),
        ((Pruning(share=0.99), DPSGD(level="client", noise_multiplier=0.0, target_epsilon=None)), 420),
    ],
)  # fmt: skip
def test_bits_of_a_thousand_entries_by_hand(chosen, bits):
    private = next((part for part in (chosen if isinstance(chosen, tuple) else ()) if isinstance(part, DPSGD)), None)
    spends = private and types.SimpleNamespace(noise_multiplier=1.0 if private.noise_multiplier is None else private.noise_multiplier)
    defence = build.make_defence(chosen, RECIPE, build.Shape(8, (3, 16, 16)), seed=0, spends=spends)
    assert defence.upload_bits({"w": 1000}) == bits
    masked = defence.secure is not None
    assert defence.upload_bits({"w": 1000, "b": 1}, {"mean": 10}) == bits + Defence.upload_bits(defence, {"b": 1}) + (640 if masked else 320)


class Own(Defence):
    def share(self, update, *, generator, own=None):
        return update


class Half:
    """A change of one's own that does not say how it leaves."""


def test_what_does_not_say_how_it_leaves_counts_as_float32():
    model = build.make_defence(Undefended(), RECIPE, build.Shape(8, (3, 16, 16)), seed=0).model
    assert Own(model).upload_bits({"w": 1000}) == 32_000
    defence = Defence(model)
    defence.transforms = (SignOnly(), Half())
    assert defence.upload_bits({"w": 1000}) == 32_000
    defence.transforms = (Half(), SignOnly())
    assert defence.upload_bits({"w": 1000}) == 1_032


def per_round(chosen, tmp_path, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    setting = build.load_setting(recipe, world=World(), notice=lambda text: None)
    training = build.make_training(setting, chosen, seed=0, world=World(), state_folder=tmp_path)
    sizes = {name: tensor.numel() for name, tensor in training.server.params.items()}
    return build.bytes_per_round(training, recipe), sizes


def test_bytes_of_a_round_are_down_in_float32_and_up_as_the_defence_sends_them(tmp_path):
    """Three clients, and ten of which seven stay."""
    plain, sizes = per_round(Undefended(), tmp_path)
    entries = sum(sizes.values())
    assert plain == 3 * 4 * entries * 2
    assert per_round(Sign(), tmp_path)[0] == 3 * (4 * entries + -(-(entries + 32 * len(sizes)) // 8))
    head, predictor = per_round(Undefended(), tmp_path, share_policy="head")
    assert head == 3 * 4 * sum(predictor.values()) * 2 and predictor.keys() < sizes.keys()
    ten = {"data": dataclasses.replace(RECIPE.data, num_clients=10, min_examples=1)}
    assert per_round(SecureAggregation(dropouts=0.3), tmp_path, **ten)[0] == 10 * 4 * entries + 7 * 8 * entries
    assert per_round(SecureAggregation(), tmp_path, **ten, rounds=Rounds(count=1, cohort_size=4))[0] == 4 * 12 * entries


def test_control_variates_and_running_statistics_leave_as_they_are(tmp_path):
    sgd = LocalTraining(batch_size=8, optimiser="sgd", lr=0.1)
    for server, twice in ((FedAvg(), 1), (Scaffold(), 2)):
        found, sizes = per_round(Quantisation(bits=4), tmp_path, clients=sgd, rounds=Rounds(count=1, server=server))
        entries = sum(sizes.values())
        assert found == 3 * (twice * 4 * entries + (twice - 1) * 4 * entries + -(-(4 * entries + 32 * len(sizes)) // 8))
    moved = {"model": Model(name="resnet18", norm="keep", cut="layer1"), "evaluation": Evaluation(num_victims=2, batch_size=2)}
    found, sizes = per_round(Sign(), tmp_path, **moved)
    statistics = {name for name in sizes if "running" in name}
    signed = {name: size for name, size in sizes.items() if name not in statistics}
    up = sum(signed.values()) + 32 * len(signed) + 32 * sum(sizes[name] for name in statistics)
    assert statistics and found == 3 * (4 * sum(sizes.values()) + -(-up // 8))
