"""What is read off a recipe's JSON, against the configuration that wrote it."""

from dataclasses import fields

from gidef import config
from gidef.report.kinds import STRENGTHS, family, kinds, settings, strengths


def test_every_strength_is_a_number_of_some_defence():
    numbers = {spec.name for defence in config.DEFENCES for spec in fields(defence) if spec.type in (int, float) or "float" in str(spec.type)}
    assert set(STRENGTHS) <= numbers and not {"decoder_width", "kernel", "width"} & set(STRENGTHS)


def test_searches_and_combinations_are_opened():
    both = config.Matched(defence=(config.IsotropicNoise(), config.Pruning()), field="std")
    recipe = config.Recipe(defences={"both": both, "none": config.Undefended()})
    results = {"recipe": config.to_json(recipe), "tuned": {"both": {"value": 3.5}}}
    assert kinds(config.to_json(both)) == ["IsotropicNoise", "Pruning"] and kinds(None) == []
    assert family(results, "both") == "IsotropicNoise + Pruning" and family(results, "gone") == "gone"
    found = settings(results, "both")
    assert found["0", "IsotropicNoise", "std"] == 3.5 and found["1", "Pruning", "share"] == 0.9
    assert settings({"recipe": results["recipe"]}, "both")["0", "IsotropicNoise", "std"] is None, "not said by these results"


def test_a_search_over_the_noise_of_dpsgd_leaves_no_epsilon_to_it():
    searched = config.Matched(defence=config.DPSGD(), field="noise_multiplier", low=0.1, high=2.0)
    recipe = config.Recipe(defences={"searched": searched, "given": searched.at(0.7)})
    results = {"recipe": config.to_json(recipe), "tuned": {"searched": {"value": 0.7}}}
    assert settings(results, "searched") == settings(results, "given")


def test_groups_differ_in_one_strength_and_rise():
    def noise(**more):
        return settings({"recipe": {"defences": {"x": config.to_json(config.IsotropicNoise(**more))}}}, "x")

    chosen = {"4": noise(std=4.0), "1": noise(std=1.0), "laplace 1": noise(std=1.0, law="laplace"), "laplace 2": noise(std=2.0, law="laplace"), "again": noise(std=4.0)}
    assert strengths(chosen) == [["1", "4"], ["laplace 1", "laplace 2"]]
    assert strengths({"1": noise(std=1.0)}) == [] and strengths({}) == []
