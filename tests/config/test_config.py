"""Every shipped configuration loads, and an error in one names file and key."""

from pathlib import Path

import pytest

from fp8pipe import config
from fp8pipe.errors import ConfigError

LOADERS = {
    "recipes": config.load_recipe,
    "suites": config.load_suite,
    "gates": config.load_policy,
    "collections": config.load_collection,
}
SHIPPED = [(kind, name) for kind in LOADERS for name in config.shipped(kind)]


@pytest.mark.parametrize(("kind", "name"), SHIPPED, ids=[f"{kind}/{name}" for kind, name in SHIPPED])
def test_shipped_file_loads_under_its_own_name(kind, name):
    loaded = LOADERS[kind](name)
    if kind != "collections":
        assert loaded.name == name


@pytest.mark.parametrize("name", config.shipped("collections"))
def test_shipped_collection_names_recipes_suites_and_policies_that_fit(name):
    for release in config.load_collection(name).releases():
        release.resolve()


def test_every_kind_ships_something():
    assert {kind for kind, _ in SHIPPED} == set(LOADERS)


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_unknown_key_is_named_with_its_file(tmp_path):
    path = written(tmp_path, "name: mine\nweigths: {strategy: tensor}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*\n.*weigths: unknown key"):
        config.load_recipe(path)


def test_unknown_nested_key_is_named_with_its_path(tmp_path):
    path = written(tmp_path, "name: mine\nweights: {stratgy: tensor}\n")
    with pytest.raises(ConfigError, match=r"weights\.stratgy: unknown key"):
        config.load_recipe(path)


def test_unknown_name_lists_what_there_is():
    with pytest.raises(ConfigError, match="fp8-dynamic"):
        config.load_recipe("fp9")


@pytest.mark.parametrize(
    "text",
    [
        "name: x\nweights: {strategy: channel}\ncheckpoint_format: fp8\n",
        "name: x\nactivations: {mode: static, strategy: token}\n",
        "name: x\nweights: {strategy: block}\nactivations: {mode: static, strategy: tensor}\n",
        "name: x\nweights: {strategy: block}\nactivations: null\n",
        "name: x\nweights: {strategy: tensor}\nactivations: {mode: dynamic, strategy: group}\n",
        "name: x\nkv_cache: {strategy: head}\nweights: {strategy: tensor}\ncheckpoint_format: fp8\n",
    ],
)
def test_recipe_that_no_format_can_spell_is_refused(tmp_path, text):
    with pytest.raises(ConfigError):
        config.load_recipe(written(tmp_path, text))


def test_file_that_is_not_yaml_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not YAML"):
        config.load_recipe(written(tmp_path, "name: [unclosed\n"))


def test_suite_may_not_choose_the_model(tmp_path):
    path = written(tmp_path, "name: x\ntasks: {a: {}}\nengine: {quantization: fp8}\n")
    with pytest.raises(ConfigError, match="quantization"):
        config.load_suite(path)


def collection(tmp_path: Path, text: str) -> config.CollectionSpec:
    top = "collection: {namespace: o, title: t}\nsuite: quick\npolicy: quick\n"
    return config.load_collection(written(tmp_path, top + text))


@pytest.mark.parametrize(
    "text",
    [
        "models: [{id: a/m}, {id: b/M}]\nrecipes: [fp8-dynamic]\n",
        "models: [{id: a/m}]\nrecipes: [fp8-dynamic, fp8-block]\nrepo_name: '{namespace}/{model}'\n",
        "models: [{id: a/m}, {id: a/n, overrides: {repo_id: o/m-FP8-dynamic}}]\nrecipes: [fp8-dynamic]\n",
    ],
    ids=["names that differ in case", "recipes without a suffix", "an override"],
)
def test_two_releases_for_one_repository_are_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"would both be released as o/\w+"):
        collection(tmp_path, text)


def test_a_collection_tells_its_releases_who_may_see_them_and_what_they_may_replace(tmp_path):
    models = "models: [{id: a/m}, {id: a/n, overrides: {visibility: public}}]\nrecipes: [fp8-dynamic]\n"
    releases = collection(tmp_path, models + "visibility: gated\nreplace: true\n").releases()
    assert [(one.target.visibility, one.target.replace) for one in releases] == [("gated", True), ("public", True)]


def test_policy_on_a_task_the_suite_does_not_measure_is_refused(tmp_path):
    suite = written(tmp_path, "name: s\ntasks: {a: {}}\n")
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: p\ntasks: {b: {metric: acc, margin: 0.02}}\n")
    spec = config.ReleaseSpec(model="o/m", repo_id="o/m-FP8", suite=suite, policy=str(policy))
    with pytest.raises(ConfigError, match="gates on b"):
        spec.resolve()


@pytest.mark.parametrize("limit", ["min_speedup: 1.2", "max_memory_ratio: 0.6"])
def test_limit_on_serving_needs_a_suite_that_times_it(tmp_path, limit):
    policy = config.load_policy(written(tmp_path, f"name: p\ntasks: {{a: {{metric: acc, margin: 0.02}}}}\n{limit}\n"))
    untimed = config.EvalSuite(name="s", tasks={"a": config.TaskSpec()})
    with pytest.raises(ConfigError, match=rf"limits {limit.split(':')[0]}.*add `serving: \{{\}}` to the suite"):
        config.check_fit(policy, untimed)
    config.check_fit(policy, untimed.model_copy(update={"serving": config.ServingWorkload()}))


def test_a_task_has_one_metric_or_a_list_of_them(tmp_path):
    one, other = "{metric: em, filter: strict, margin: 0.03}", "{metric: em, filter: loose, margin: 0.02}"
    single = config.load_policy(written(tmp_path, f"name: p\ntasks: {{a: {one}}}\n"))
    several = config.load_policy(written(tmp_path, f"name: p\ntasks: {{a: [{one}, {other}]}}\n"))
    assert [(task, limit.filter) for task, limit in several.gated] == [("a", "strict"), ("a", "loose")]
    assert (single.gated, single.gated_tasks) == (several.gated[:1], several.gated_tasks)
    for policy in (single, several):
        assert config.GatePolicy.model_validate_json(policy.model_dump_json()) == policy
    with pytest.raises(ConfigError, match="a em,strict: named twice"):
        config.load_policy(written(tmp_path, f"name: p\ntasks: {{a: [{one}, {one}]}}\n"))
    with pytest.raises(ConfigError, match=r"tasks\.a"):
        config.load_policy(written(tmp_path, "name: p\ntasks: {a: []}\n"))
    with pytest.raises(ConfigError, match="neither tasks nor perplexity"):
        config.load_policy(written(tmp_path, "name: p\n"))


@pytest.mark.parametrize("metric", ["word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte"])
def test_a_likelihood_among_the_scores_is_refused_with_where_it_belongs(tmp_path, metric):
    text = f"name: p\ntasks: {{a: {{metric: {metric}, margin: 0.02}}}}\n"
    with pytest.raises(ConfigError, match=f"{metric} is a likelihood, not a score: put the task under `perplexity`"):
        config.load_policy(written(tmp_path, text))


def test_a_policy_that_uses_nothing_new_has_the_digest_it_always_had(tmp_path):
    text = "name: p\ntasks: {a: {metric: acc, margin: 0.02}}\nperplexity: {b: {max_increase: 0.01}}\n"
    # Written out: approvals and decisions on record name the digest.
    known = "084036cc41444516da05f1b28ab7a89418bf384fef2b96eebc42d216df5cb03c"
    assert config.load_policy(written(tmp_path, text)).digest() == known


@pytest.mark.parametrize(
    ("counts", "says"),
    [("documents: 5, samples: 6", "6 of 5 documents"), ("subtasks: 3", "subtasks goes with documents")],
)
def test_counts_of_a_task_that_do_not_fit_each_other_are_refused(tmp_path, counts, says):
    with pytest.raises(ConfigError, match=says):
        config.load_suite(written(tmp_path, f"name: s\ntasks: {{a: {{{counts}}}}}\n"))


def test_identity_ignores_names_and_unused_calibration():
    one = config.load_recipe("fp8-dynamic")
    other = one.model_copy(update={"name": "other", "calibration": config.CalibrationSpec(num_samples=3)})
    assert one.identity() == other.identity()
    static = config.load_recipe("fp8-static")
    fewer = static.model_copy(update={"calibration": config.CalibrationSpec(num_samples=3)})
    assert static.identity() != fewer.identity()


@pytest.mark.parametrize("name", ["fp8-dynamic", "fp8-static"])
def test_a_folder_of_the_machine_is_no_identity_and_is_not_published(name):
    data = config.CalibrationSpec(dataset="/srv/secret/data.jsonl")
    steps = ("/srv/mine.yaml", {"calibration": {"dataset": "~/secret/more.txt"}}, "fp8-block")
    recipe = config.load_recipe(name).model_copy(update={"calibration": data, "fallback": steps})
    elsewhere = recipe.model_copy(update={"calibration": config.CalibrationSpec(dataset="data.jsonl")})
    assert recipe.identity() == elsewhere.identity()
    shown = recipe.without_paths()
    assert shown.calibration.dataset == "data.jsonl"
    assert shown.fallback == ("mine.yaml", {"calibration": {"dataset": "more.txt"}}, "fp8-block")
    hub = recipe.model_copy(update={"calibration": config.CalibrationSpec(dataset="acme/data")})
    assert hub.without_paths().calibration.dataset == "acme/data"


SUITE = "name: mine\ntasks: {t: {}}\n"


def test_a_suite_is_spread_over_as_few_devices_as_hold_the_model_unless_it_says_otherwise(tmp_path):
    assert config.load_suite(written(tmp_path, SUITE)).parallel == "auto"
    given = config.load_suite(written(tmp_path, SUITE + "parallel: {tensor: 4, pipeline: 2, data: 2, expert: true}\n"))
    assert given.parallel == config.Parallel(tensor=4, pipeline=2, data=2, expert=True)
    with pytest.raises(ConfigError, match=r"(?s)mine\.yaml.*parallel.*tensor.*greater than or equal to 1"):
        config.load_suite(written(tmp_path, SUITE + "parallel: {tensor: 0}\n"))


def test_a_release_and_a_model_of_a_collection_override_the_suites_parallelism(tmp_path):
    spec = config.ReleaseSpec(model="m", repo_id="acme/m", suite=written(tmp_path, SUITE + "parallel: {data: 2}\n"))
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: mine\ntasks: {t: {metric: acc, margin: 0.02, min_baseline: 0.25}}\n")
    spec = spec.model_copy(update={"policy": str(policy)})
    assert spec.resolve().suite.parallel == config.Parallel(data=2)
    fields = spec.model_dump() | {"parallel": {"tensor": 2}}
    other = config.validated(config.ReleaseSpec, fields, "release").resolve()
    assert other.suite.parallel == config.Parallel(tensor=2)
    assert other.suite.digest() == spec.resolve().suite.digest()


def test_parallelism_in_words_is_that_of_a_file():
    def read(words):
        return config.validated(
            config.ReleaseSpec, {"model": "m", "repo_id": "a/m", "parallel": words}, "release"
        ).parallel

    assert read("auto") == "auto"
    assert read("tensor=4,data=2, expert") == config.Parallel(tensor=4, data=2, expert=True)
    assert str(read("pipeline=2,expert")) == "pipeline 2, expert"
    with pytest.raises(ConfigError, match=r"parallel\.Parallel\.tensr: unknown key"):
        read("tensr=4")
