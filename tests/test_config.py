"""Every shipped configuration loads, and what is wrong in one is said with file and key."""

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


def test_policy_on_a_task_the_suite_does_not_measure_is_refused(tmp_path):
    suite = written(tmp_path, "name: s\ntasks: {a: {}}\n")
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: p\ntasks: {b: {metric: acc, margin: 0.02}}\n")
    spec = config.ReleaseSpec(model="o/m", repo_id="o/m-FP8", suite=suite, policy=str(policy))
    with pytest.raises(ConfigError, match="gates on b"):
        spec.resolve()


def test_identity_ignores_names_and_unused_calibration():
    one = config.load_recipe("fp8-dynamic")
    other = one.model_copy(update={"name": "other", "calibration": config.CalibrationSpec(num_samples=3)})
    assert one.identity() == other.identity()
    static = config.load_recipe("fp8-static")
    fewer = static.model_copy(update={"calibration": config.CalibrationSpec(num_samples=3)})
    assert static.identity() != fewer.identity()
