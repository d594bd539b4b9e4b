"""A trained defence evaluated with weaker and stronger noise. Small synthetic cells, the small net, one round of training."""

import copy
import csv
import dataclasses
import json
import math

import pytest
import torch

from gidef import attack as attacks
from gidef import build, cells, cli, config, job, methods, observe, strengths
from gidef.config import CVB, CapacityNoise, IsotropicNoise, JointMatching, LearnedPerturbation, NaiveMatching, PostHocDecoder, Precode, Undefended
from gidef.errors import InputError
from gidef.metrics import auc, psnr_db
from gidef.report import kinds
from gidef.rng import generator
from gidef.runs import Snapshot, Trained
from gidef.training import train
from tests.small_run import RECIPE, evaluated, few_cells, one_thread, start, trained_once

ATTACKS = {"naive": NaiveMatching(iterations=8), "joint": JointMatching(iterations=8), "decoder": PostHocDecoder(steps=4)}
LEARNED = LearnedPerturbation(ramp=0.0, strength=0.5, std_floor=0.2, dependence_weight=0.5)
EVALUATION = dataclasses.replace(RECIPE.evaluation, batch_size=1, num_victims=2, judge_epochs=1, strengths=(0.0, 1.0, 4.0))
SMALL = dataclasses.replace(
    RECIPE, defences={"undefended": Undefended(), "learned": LEARNED, "isotropic": IsotropicNoise()}, attacks=ATTACKS, evaluation=EVALUATION,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(defence, policy): (run, what one round of it left)."""
    with trained_once(tmp_path_factory.mktemp, SMALL) as one:
        yield one


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(the run's folder, results.json of a run over three strengths)."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    with one_thread():
        yield folder, job.run_recipe(dataclasses.replace(SMALL, out=str(folder), only=("undefended", "isotropic"), attacks={"naive": ATTACKS["naive"]}), "swept")


def level(model):
    """The learned part of the level."""
    return torch.nn.functional.softplus(model.perturbation.level.detach().double()) if model.perturbation.mode == "global" else torch.tensor(model.perturbation.std).double()


@pytest.mark.parametrize("strength", [0.0, 0.25, 3.0])
@pytest.mark.parametrize("chosen", [LEARNED, LearnedPerturbation(std_init=0.05, std_floor=0.2), IsotropicNoise(std=0.7), CapacityNoise(std_init=0.05)])
def test_a_strength_multiplies_the_level_and_its_floor_and_nothing_else(chosen, strength, trained):
    run, _ = trained("undefended")
    defence = build.make_defence(chosen, run.recipe, run.setting.dataset, seed=0)
    defence.transforms = ("kept",)
    found = strengths.scaled(defence, strength)
    latent = torch.randn(2, *defence.model.latent_shape, generator=torch.Generator().manual_seed(0))
    (m, std), (expected_m, plain) = found.model.perturbation(latent), defence.model.perturbation(latent)
    floor = getattr(chosen, "std_floor", 0.0)
    by_hand = (getattr(chosen, "strength", 1.0) * level(defence.model)).clamp_min(floor)
    torch.testing.assert_close(plain.flatten().double(), by_hand.flatten(), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.flatten().double(), strength * by_hand.flatten(), rtol=1e-6, atol=0)
    assert torch.equal(m, expected_m) and found.transforms == ("kept",)
    assert all(p is q for p, q in zip(found.model.parameters(), defence.model.parameters(), strict=True))


@pytest.mark.parametrize("attack", ["naive", "joint"])
def test_at_strength_nought_attacks_score_as_on_the_normed_net_without_noise(attack, trained, tmp_path):
    """On the same weights, the first rule of sanity: the loss of both is cross-entropy."""
    run, one = trained("learned")
    run = evaluated(run, released_loss="utility", strengths=(0.0, 4.0))
    noisy = strengths.evaluated(run, {("learned", 0): one})
    assert list(noisy) == [("learned at strength 0", 0), ("learned at strength 4", 0)]
    normed = build.make_training(run.setting, IsotropicNoise(std=0.0), seed=0, world=run.world, state_folder=tmp_path)
    params = {name: one.snapshots["final"].params[name] for name in normed.shared}
    found = []
    for other in (Trained(normed, {"final": Snapshot("final", 1, 1.0, params)}, {}, ""), *noisy.values()):
        victims = observe.release(run, other, other.snapshots["final"], seed=0)
        plan = methods.plan(methods.make_case(run, other, other.snapshots["final"], ATTACKS[attack], [victims], seed=0))
        images = torch.stack([one.images for one in attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0, mode="vmap", at_once=2)])
        found.append(float(psnr_db(images.flatten(0, 1), victims.images.flatten(0, 1)).mean()))
    expected, nought, loud = found
    assert nought == pytest.approx(expected, abs=0.02) and loud < expected - 0.5


def test_at_strength_nought_the_latent_is_read_and_matched_as_it_has_no_noise(trained, tmp_path):
    run, _ = trained("isotropic")
    run = evaluated(run, strengths=(0.0, 4.0), released_loss="client")
    recipe = dataclasses.replace(run.recipe, attacks={"noise": config.ReadNoise(iterations=3), "latent": config.ReadLatent(iterations=3)})
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
    for defence, expected in (("isotropic", {"0": "latent", "4": "noise"}), ("learned", {"4": "noise"})):  # the learned one's decoder is in what is released
        noisy = strengths.evaluated(run, {(defence, 0): trained(defence)[1]})
        made = cells.make_cells(run, noisy, tmp_path)
        assert {(cell.defence, cell.name) for cell in made} == {(f"{defence} at strength {strength}", name) for strength, name in expected.items()}
        for cell in (cell for cell in made if cell.name == "latent"):
            cell.releases = [observe.release(run, cell.trained, cell.snapshot, seed=0)]
            plan = methods.plan(methods.make_case(run, cell.trained, cell.snapshot, cell.attack, cell.releases, seed=0))
            assert plan.read == len(plan.observations)
            one, truth = plan.observations[0], cell.releases[0].images[0]
            update = plan.make_simulate()(one.params, one.known, truth, torch.nn.functional.one_hot(cell.releases[0].labels[0], 8).float(), None)
            for name, tensor in one.update.items():
                torch.testing.assert_close(update[name] * one.update[name].ne(0), tensor, rtol=1e-2, atol=2e-3 * float(tensor.abs().max()) + 1e-12)


def test_the_release_at_a_strength_is_the_gradient_with_the_noise_times_it(trained):
    """ε is the same at all strengths, so noise that is four times as strong is noise of four times the ε."""
    run, one = trained("isotropic")
    stronger = strengths.evaluated(run, {("isotropic", 0): one})["isotropic at strength 4", 0]
    there = one.snapshots["final"]
    mine = observe.release(run, stronger, stronger.snapshots["final"], seed=0)
    simulate = observe.observed_simulator(run, one, there, terms="client")()
    for batch, (images, labels, noise) in enumerate(zip(mine.images, mine.labels, mine.noise, strict=True)):
        targets = torch.nn.functional.one_hot(labels, 8).float()
        expected = simulate(there.params, {}, images, targets, 4 * noise)
        for name, tensor in expected.items():
            torch.testing.assert_close(mine.updates[batch][name], tensor, rtol=1e-4, atol=1e-6)
        assert any(not torch.allclose(tensor, mine.updates[batch][name], rtol=0.1) for name, tensor in simulate(there.params, {}, images, targets, noise).items())


@pytest.mark.parametrize("policy", ["full", "head"])
@pytest.mark.parametrize("strength", [0.0, 4.0])
def test_the_accuracy_of_a_strength_is_that_of_predictions_with_its_noise(strength, policy, trained):
    run, one = trained("learned", policy)
    found = strengths.evaluated(run, {("learned", 0): one})[f"learned at strength {strength:g}", 0].summary
    test, final, values = run.setting.dataset.test, one.snapshots["final"], []
    for client in range(3 if policy == "head" else 1):
        model = copy.deepcopy(one.training.defence.model).eval()
        model.load_state_dict({**one.training.participation.state(client, final.versions), **final.params}, strict=False)
        noise = model.perturbation.draw(len(test), generator=generator(0, "evaluation", "test", 0))
        values.append([])
        for factor in (strength, 1.0):
            model.perturbation.strength = 0.5 * factor  # the floor is not reached at the learned level, about 1
            model.perturbation.std_floor = 0.0
            with torch.no_grad():
                values[-1].append(auc(model(test.images.float() / 255, noise), test.labels))
    mine, plain = (sum(column) / len(values) for column in zip(*values, strict=True))
    assert found["auc"] == pytest.approx(mine, abs=1e-9) and one.summary["auc"] == pytest.approx(plain, abs=1e-9)
    assert mine != plain and found["trained_as"] == "learned" and found["strength"] == strength
    player = one.training.participation.players[0].model.perturbation
    assert (player.strength, player.std_floor) == (0.5, 0.2)  # as it was


def test_a_run_has_a_row_for_each_strength_and_says_so(swept):
    folder, content = swept
    names = {"undefended": None, "isotropic at strength 0": 0.0, "isotropic": 1.0, "isotropic at strength 4": 4.0}
    assert list(dict.fromkeys(row["defence"] for row in content["rows"])) == list(names)
    tests = {one["defence"]: one for one in content["training"]}
    assert set(tests) == set(names)
    for row in content["rows"]:
        strength = names[row["defence"]]
        assert row["threat"].get("strength") == strength and row["failed"] == 0
        assert ("times as strong" in row["threat"]["name"]) == (strength not in (None, 1.0))
        assert row["client_accuracy"] == tests[row["defence"]]["test_accuracy"]
    psnr = {row["defence"]: row["psnr_db"]["mean"] for row in content["rows"]}
    assert psnr["isotropic at strength 0"] > psnr["isotropic"] > psnr["isotropic at strength 4"]
    assert set(content["weights_sha256"]) == set(content["seconds"]["train"]) == {"undefended/0", "isotropic/0"}
    assert "isotropic at strength 4" in (folder / "table.csv").read_text() and "4 times as strong" in (folder / "table.md").read_text()
    page = (folder / "report.html").read_text()
    assert "isotropic at strength 0" in page and kinds.family(content, "isotropic at strength 4") == "IsotropicNoise"
    assert kinds.strengths({name: kinds.settings(content, name) for name in names}) == [["isotropic at strength 0", "isotropic", "isotropic at strength 4"]]
    costs = page[page.index('id="cost"') : page.index('id="origin"')].partition("Seconds of each")[0]
    assert "isotropic" in costs and "at strength" not in costs  # there is one training
    peak = tests["isotropic"]["process_peak_gib"]
    anew = tests["isotropic"]["process_peak_of"] == "training"
    assert ("process peak gib" if anew else "process peak so far gib") in costs and f'data-value="{peak!r}"' in costs


@pytest.mark.slow
def test_at_strength_one_nothing_differs_from_a_run_that_asks_for_no_other(tmp_path):
    found = []
    for swept in ((0.0, 1.0), (1.0,)):
        evaluation = dataclasses.replace(EVALUATION, strengths=swept)
        found.append(job.run_recipe(dataclasses.replace(SMALL, out=str(tmp_path / str(len(swept))), evaluation=evaluation, only=("undefended", "learned")), "one"))
    content, plain = found
    assert [row["defence"] for row in plain["rows"]] == ["undefended"] * 2 + ["learned"] * 3 and content["weights_sha256"] == plain["weights_sha256"]

    def told(row):
        threat = {key: value for key, value in row["threat"].items() if key != "strength"}
        return {key: value for key, value in row.items() if key not in ("seconds", "calibration", "threat")} | threat

    mine = {(row["defence"], row["attack"]): told(row) for row in content["rows"]}
    for row in plain["rows"]:
        assert "strength" not in row["threat"] and told(row) == mine[row["defence"], row["attack"]]


def test_a_run_has_an_mse_that_can_be_compared_between_data_sets(swept):
    folder, content = swept
    public = few_cells().val.images.numpy().astype(float) / 255
    spread = ((public - public.mean(0)) ** 2).mean()
    for row in (*content["rows"], *content["bounds"]):
        for part in ("mean", "low", "high", "worst", "worst_decile"):
            assert row["nmse"][part] == pytest.approx(row["mse"][part] / spread, rel=1e-4)
    table = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [float(line["nmse_mean"]) for line in table] == [row["nmse"]["mean"] for row in (*content["rows"], *content["bounds"])]
    page = (folder / "report.html").read_text()
    assert page.count('data-key="nmse"') == len(table) and ">NMSE<" in page
    assert {json.loads(line)["nmse"] > 0 for line in (folder / "record.jsonl").read_text().splitlines() if json.loads(line)["kind"] == "attack"} == {True}


def test_a_finished_run_is_attacked_at_other_strengths(swept, tmp_path):
    folder, content = swept
    out = tmp_path / "again"
    cli.main(["attack", str(folder), "--attack", "naive", "--defence", "isotropic", "--strength", "0.5", "4", "--allow-code", "--out", str(out)])
    again = json.loads((out / "results.json").read_text())
    assert [row["defence"] for row in again["rows"]] == ["isotropic at strength 0.5", "isotropic at strength 4"]
    [before] = [row for row in content["rows"] if (row["defence"], row["attack"]) == ("isotropic at strength 4", "naive")]
    assert again["rows"][1]["psnr_db"] == before["psnr_db"] and again["rows"][1]["client_accuracy"] == before["client_accuracy"]


def test_bits_are_certified_at_the_strength_of_the_release_and_not_for_the_training(tmp_path):
    from gidef import findings
    from gidef.cells import make_cells
    from gidef.defence.capacity import capacity_bits

    chosen = {"still": CapacityNoise(front="frozen", level="fixed", std_init=2.0), "once": CapacityNoise(front="frozen", frozen=True), "isotropic": IsotropicNoise(std=2.0)}
    recipe = dataclasses.replace(
        SMALL, clients=dataclasses.replace(SMALL.clients, grad_clip=0.0), model=config.Model(cut="neck", neck=8), share_policy="head", defences=chosen, attacks={"naive": NaiveMatching()},
        evaluation=dataclasses.replace(EVALUATION, strengths=(1.0, 0.5, 0.0)),
    )  # fmt: skip
    run, told = start(recipe, tmp_path), {}
    with one_thread():
        for name in chosen:
            one = train(run, name, chosen[name], 0)
            for (called, _), other in strengths.evaluated(run, {(name, 0): one}).items():
                [cell] = make_cells(run, {(called, 0): other}, run.folder)
                cell.releases = [observe.release(run, other, cell.snapshot, seed=0)]
                told[called] = findings._certificate(run, [cell])[0]
    for strength, name in ((1.0, "still"), (0.5, "still at strength 0.5"), (0.5, "isotropic at strength 0.5")):
        assert told[name]["certified_bits"] == pytest.approx(float(capacity_bits(torch.full((8,), 2.0 * strength).double())), rel=1e-5)
        assert told[name]["certified_bits"] == pytest.approx(8 / 2 * math.log2(1 + 1 / (2 * strength) ** 2), rel=1e-5)
    assert told["still"]["lifetime_bits"] is not None and told["still at strength 0.5"]["lifetime_bits"] is None
    assert "another strength" in told["still at strength 0.5"]["uncertified_lifetime"]
    assert told["once"]["certified_bits"] and "give the latent away" in told["once at strength 0.5"]["uncertified"]
    assert "sigma is 0" in told["isotropic at strength 0"]["uncertified"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strengths": ()}, "is empty"), ({"strengths": (1.0, 1.0)}, "repeats one"), ({"strengths": (2.0, 2.0000001)}, "repeats one"),
        ({"strengths": (-1.0,)}, "too small"), ({"strengths": (math.inf,)}, "not finite"), ({"defences": {"a": Undefended()}}, "no defence here has noise"),
        ({"defences": {"a": CVB()}}, "CVB's code has the scale"), ({"defences": {"a": Precode()}}, "Precode's code"),
        ({"defences": {"a": CapacityNoise()}}, "no capacity that is finite"), ({"defences": {"a": LearnedPerturbation(kl_weight=0.1)}}, "is infinite at evaluation.strengths=0"),
        ({"defences": {"a": LEARNED, "a at strength 4": IsotropicNoise()}}, "rename it"),
    ],
)  # fmt: skip
def test_what_a_strength_cannot_multiply_is_refused(changes, said):
    evaluation = dataclasses.replace(EVALUATION, **{key: value for key, value in changes.items() if key == "strengths"})
    recipe = dataclasses.replace(SMALL, evaluation=evaluation, **{key: value for key, value in changes.items() if key != "strengths"})
    assert any(said in text for text in config.problems(recipe)), config.problems(recipe)


def test_what_a_strength_can_multiply_is_not():
    for defences, changes in (
        ({"a": CapacityNoise()}, {"strengths": (0.5, 1.0)}), ({"a": LearnedPerturbation(kl_weight=0.1)}, {"released_loss": "utility"}),
        ({"a": (LEARNED, config.Pruning()), "b": Undefended()}, {}), ({"a": CVB()}, {"strengths": (1.0,)}), ({"out": CVB(), "b": LEARNED}, {}),
    ):  # fmt: skip
        recipe = dataclasses.replace(SMALL, defences=defences, evaluation=dataclasses.replace(EVALUATION, **changes), only=("b",) * ("out" in defences))
        assert config.problems(recipe) == []


def test_noise_of_your_own_without_a_level_is_refused_before_anything_is_trained(trained):
    run, _ = trained("undefended")
    bottleneck = build.make_defence(CVB(), run.recipe, run.setting.dataset, seed=0)
    with pytest.raises(InputError, match="ConvBottleneck is none"):
        strengths.check(bottleneck, (0.5,), "mine")
    strengths.check(bottleneck, (1.0,), "mine")
