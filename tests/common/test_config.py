"""The run's configuration: refused where it is wrong, with the key, what was expected and the nearest known name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from common import config as module
from common.config import DataConfig, RunConfig, checked, parse_value, setting_keys
from common.errors import ConfigError, WardroundError
from common.method import MethodParams
from common.methods import METHODS, get_method

SECTIONS = ("data", "model", "train", "rounds")


class Params(MethodParams):
    """A method whose parameter has the name of a setting."""

    lr: float = Field(0.5, ge=0, description="λ")
    rank: int = Field(3, ge=1, description="r")


def run(**sections):
    return RunConfig.from_mapping(sections)


def test_an_empty_text_gives_the_defaults():
    assert RunConfig.from_json("") == RunConfig.from_json(" \n") == RunConfig.from_json("{}") == RunConfig()


@pytest.mark.parametrize(
    ("mapping", "place", "meant"),
    [
        ({"methd": "fedavg"}, "methd", "method"),
        ({"trian": {"lr": 1}}, "trian", "train"),
        ({"data": {"chanels": ["T1"]}}, "data.chanels", "channels"),
        ({"model": {"widht": 3}}, "model.widht", "width"),
        ({"train": {"local-epoch": 3}}, "train.local_epoch", "local_epochs"),
        ({"rounds": {"quorom": 1}}, "rounds.quorom", "quorum"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest_known_one(mapping, place, meant):
    with pytest.raises(ConfigError, match=f"Unknown key '{place}'. Did you mean '{meant}'[?] Known: "):
        RunConfig.from_mapping(mapping)


def test_an_unknown_parameter_names_its_method():
    with pytest.raises(ConfigError, match=r"Unknown key 'fedprox\.muu'. Did you mean 'mu'\?"):
        METHODS["fedprox"].parse({"muu": 1})
    with pytest.raises(ConfigError, match=r"Bad value for 'ditto\.lam'.*greater than or equal to 0, got -1"):
        METHODS["ditto"].parse({"lam": -1})


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'local-only'"):
        get_method("localonly")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"task": "detection"}),
        ("data", {"spatial_dims": 4}),
        ("data", {"spatial_dims": 0}),
        ("data", {"patch": [32, 32]}),
        ("data", {"patch": [32, 32, 0]}),
        ("data", {"spacing": [1, 1]}),
        ("data", {"spacing": [1, 1, 0]}),
        ("data", {"spacing": [1, 1, -1]}),
        ("data", {"labels": ["one"]}),
        ("data", {"labels": ["a", "b", "a"]}),
        ("data", {"channels": []}),
        ("data", {"channels": ["T1", "T1"]}),
        ("data", {"channels": "T1"}),
        ("data", {"patches_per_case": 0}),
        ("data", {"foreground_ratio": 1.1}),
        ("data", {"normalise": "z"}),
        ("data", {"spacing_tolerance": -0.1}),
        ("data", {"spacing_tolerance": float("inf")}),
        ("model", {"width": 0}),
        ("model", {"levels": 7}),
        ("model", {"dropout": 1.0}),
        ("model", {"hidden": [0]}),
        ("model", {"norm": "layer"}),
        ("train", {"local_epochs": 0}),
        ("train", {"local_epochs": 1.5}),
        ("train", {"batch_size": 0}),
        ("train", {"lr": 0}),
        ("train", {"lr": "fast"}),
        ("train", {"lr": float("inf")}),
        ("train", {"lr": float("nan")}),
        ("train", {"momentum": 1.0}),
        ("train", {"weight_decay": -1}),
        ("train", {"clip_norm": -1}),
        ("train", {"class_weights": [1.0, float("nan")]}),
        ("rounds", {"rounds": 0}),
        ("rounds", {"quorum": 0}),
        ("rounds", {"quorum": 1.01}),
        ("rounds", {"deadline": 0}),
        ("rounds", {"deadline": float("inf")}),
        ("rounds", {"sample": 0}),
        ("rounds", {"poll": 0}),
        ("rounds", {"hd95": "sometimes"}),
    ],
)
def test_a_value_out_of_its_range_is_refused_where_it_stands(section, values):
    (key,) = values
    with pytest.raises(ConfigError, match=rf"Bad value for '{section}(\.{key}(\.\d)?)?'"):
        run(**{section: values})


@pytest.mark.parametrize(
    "values", [{"version": 2}, {"seed": -1}, {"seed": 2**32}, {"sites": "a"}, {"train": 3}, {"params": []}]
)
def test_a_bad_value_at_the_top_is_refused(values):
    (key,) = values
    with pytest.raises(ConfigError, match=f"Bad value for '{key}'"):
        run(**values)


def test_tables_need_no_patch_and_pictures_two_sizes():
    assert run(data={"task": "tabular", "spatial_dims": 0, "patch": []}).data.patch == ()
    assert run(data={"spatial_dims": 2, "patch": [8, 8], "spacing": [0.5, 0.5]}).data.spacing == (0.5, 0.5)


def test_kebab_case_is_read_at_every_depth():
    config = run(
        **{"train": {"local-epochs": 4}, "rounds": {"ready-timeout": 9}, "params": {"personal-epochs": 2}}
    )
    assert (config.train.local_epochs, config.rounds.ready_timeout) == (4, 9)
    assert config.params == {"personal_epochs": 2}


def test_a_key_written_both_ways_is_refused_and_not_silently_dropped():
    with pytest.raises(ConfigError, match="'local_epochs' is given twice"):
        run(train={"local-epochs": 4, "local_epochs": 5})


def test_a_config_is_frozen_at_every_depth():
    config = RunConfig()
    for target, key in ((config, "seed"), (config.train, "lr"), (config.data, "task")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, key, 1)


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["{", "nope", '{"seed": 1,}', "[" * 100_000, '{"seed": ' + "1" * 5000 + "}", "\0"]
)
def test_text_that_is_no_json_is_refused(text):
    with pytest.raises(ConfigError, match="not JSON"):
        RunConfig.from_json(text)


def test_a_json_error_names_its_line():
    with pytest.raises(ConfigError, match="line 2"):
        RunConfig.from_json('{\n"seed" 1}')


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null", "true"])
def test_json_that_is_no_object_is_refused(text):
    with pytest.raises(ConfigError, match="must be a JSON object"):
        RunConfig.from_json(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(number):
    with pytest.raises(ConfigError, match=r"Bad value for 'train\.lr'"):
        RunConfig.from_json(f'{{"train": {{"lr": {number}}}}}')


@settings(deadline=None, max_examples=60)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**32 - 1),
            "sites": st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,7}", fullmatch=True), max_size=3),
            "params": st.dictionaries(
                st.sampled_from("abc"), st.integers() | st.floats(allow_nan=False, allow_infinity=False)
            ),
            "train": st.fixed_dictionaries(
                {}, optional={"lr": st.floats(1e-300, 1e300), "class_weights": st.none() | st.just([1, 2])}
            ),
            "rounds": st.fixed_dictionaries({"rounds": st.integers(1, 10**6), "quorum": st.floats(0.01, 1)}),
        },
    )
)
def test_json_is_canonical_and_exact(mapping):
    config = RunConfig.from_mapping(mapping)
    text = config.to_json()
    assert RunConfig.from_json(text) == config
    assert RunConfig.from_json(text).to_json() == text
    backwards = dict(
        reversed(
            [
                (key, dict(reversed(value.items())) if isinstance(value, dict) else value)
                for key, value in mapping.items()
            ]
        )
    )
    assert RunConfig.from_mapping(backwards).to_json() == text
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_the_canonical_form_carries_every_setting():
    document = json.loads(RunConfig().to_json())
    assert document.keys() == RunConfig.model_fields.keys()
    for section in SECTIONS:
        assert document[section].keys() == type(getattr(RunConfig(), section)).model_fields.keys()


# ---- --set key=value -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("train.lr", "0.25", lambda c: c.train.lr == 0.25),
        ("train.batch-size", "7", lambda c: c.train.batch_size == 7),
        ("batch_size", 7, lambda c: c.train.batch_size == 7),
        ("quorum", "0.5", lambda c: c.rounds.quorum == 0.5),
        ("rounds.rounds", "9", lambda c: c.rounds.rounds == 9),
        ("rounds", "9", lambda c: c.rounds.rounds == 9),
        ("name", "unet", lambda c: c.model.name == "unet"),
        ("hidden", "[64, 32]", lambda c: c.model.hidden == (64, 32)),
        ("hidden", "64,32", lambda c: c.model.hidden == (64, 32)),
        ("channels", "T1, T2", lambda c: c.data.channels == ("T1", "T2")),
        ("spacing", "null", lambda c: c.data.spacing is None),
        ("augment", "false", lambda c: c.data.augment is False),
        ("seed", "12", lambda c: c.seed == 12),
        ("rank", "5", lambda c: c.params == {"rank": 5}),
        ("params.rank", "5", lambda c: c.params == {"rank": 5}),
        ("lr", "0.25", lambda c: c.params == {"lr": 0.25} and c.train.lr == 1e-3),
        ("params.lr", "0.25", lambda c: c.params == {"lr": 0.25}),
    ],
)
def test_a_setting_finds_its_place(key, value, found):
    assert found(RunConfig().with_settings({key: value}, Params))


def test_settings_join_and_the_original_stays():
    config = run(params={"rank": 2}, train={"lr": 0.5})
    changed = config.with_settings({"params.lr": 1, "momentum": 0}, Params)
    assert changed.params == {"rank": 2, "lr": 1}
    assert (changed.train.lr, changed.train.momentum) == (0.5, 0)
    assert (config.params, config.train.momentum) == ({"rank": 2}, 0.9)


@pytest.mark.parametrize(
    ("key", "meant"), [("train.lrr", "train.lr"), ("quorom", "quorum"), ("ranks", "rank")]
)
def test_an_unknown_setting_names_the_nearest(key, meant):
    with pytest.raises(ConfigError, match=f"Unknown setting '{key}'. Did you mean '{meant}'"):
        RunConfig().with_settings({key: "1"}, Params)


@pytest.mark.parametrize("key", ["version", "sites", "data", "params", "train", "", "params.", "train.lr.x"])
def test_what_is_no_setting_cannot_be_set(key):
    with pytest.raises(ConfigError, match="Unknown setting"):
        RunConfig().with_settings({key: "1"}, Params)


def test_a_name_of_several_sections_must_be_written_out(monkeypatch):
    homes = setting_keys(Params) | {"width": ["model.width", "data.width"]}
    monkeypatch.setattr(module, "setting_keys", lambda params: homes)
    with pytest.raises(
        ConfigError, match=r"exists in several sections: write one of data\.width, model\.width"
    ):
        RunConfig().with_settings({"width": "3"}, Params)


def test_a_setting_is_checked_like_any_value():
    with pytest.raises(ConfigError, match=r"Bad value for 'train\.momentum'.*got 2"):
        RunConfig().with_settings({"momentum": "2"}, Params)


def test_every_field_of_every_section_can_be_set_by_its_full_name_and_method_parameters_win():
    homes = setting_keys(Params)
    for section in SECTIONS:
        for leaf in type(getattr(RunConfig(), section)).model_fields:
            assert homes[f"{section}.{leaf}"] == [f"{section}.{leaf}"]
            assert homes[leaf] == (["params.lr"] if leaf == "lr" else [f"{section}.{leaf}"])


@given(st.text(max_size=30))
def test_any_text_is_a_value(text):
    parse_value(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3),
    )
)
def test_json_values_are_read_as_json(value):
    assert parse_value(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1,2", [1, 2]),
        ("a, b", ["a", "b"]),
        ("RAS", "RAS"),
        ("9" * 5000, "9" * 5000),
        ("[" * 20_000, "[" * 20_000),
    ],
)
def test_values_of_the_command_line(text, value):
    assert parse_value(text) == value


@given(
    st.dictionaries(
        st.sampled_from(["seed", "train", "data", "method", "x"]),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=3),
            lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=2),
        ),
        max_size=3,
    )
)
@settings(deadline=None, max_examples=60)
def test_any_mapping_gives_a_config_or_our_own_error(mapping):
    try:
        RunConfig.from_mapping(mapping)
    except WardroundError:
        return


def test_an_error_without_a_place_names_the_document():
    with pytest.raises(ConfigError, match="Bad value for 'DataConfig': Value error, spatial_dims 0"):
        checked(DataConfig, {"spatial_dims": 0, "patch": []})


@pytest.mark.parametrize("alias", ["..", "-a", ".hidden", "a/b", "", "x" * 65, "alpha\n"])
def test_a_site_that_no_alias_can_be_is_refused(alias):
    with pytest.raises(ConfigError, match=r"Bad value for 'sites\.0'"):
        run(sites=[alias])


@pytest.mark.parametrize("place", [("model", "name"), ("data", "orientation")])
@pytest.mark.parametrize("name", ["", "x" * 81, "\x1b[2J", "a\u202eb"])
def test_every_name_is_short_and_printable(place, name):
    section, key = place
    with pytest.raises(ConfigError, match=rf"Bad value for '{section}\.{key}'") as caught:
        run(**{section: {key: name}})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["deadline", "ready_timeout", "probe", "poll"])
def test_a_wait_that_no_clock_can_hold_is_refused(key):
    with pytest.raises(ConfigError, match=rf"Bad value for 'rounds\.{key}'"):
        run(rounds={key: 1e300})


def test_deep_parameters_are_refused_before_they_are_written():
    with pytest.raises(ConfigError, match="nested more than 100 levels"):
        RunConfig.from_json('{"params": {"a": ' + "[" * 500 + "]" * 500 + "}}")


def test_a_number_that_python_does_not_write_is_refused():
    with pytest.raises(ConfigError, match=r"Bad value for 'seed'.*thousands of digits"):
        run(seed=10**5000)


@pytest.mark.parametrize("text", ['{"seed": 1, "seed": 1}', '{"train": {"lr": 1, "lr": 2}}'])
def test_a_key_given_twice_is_named(text):
    with pytest.raises(ConfigError, match=r"Key '(seed|lr)' is given twice"):
        RunConfig.from_json(text)
