"""site.toml: what a hospital decides, refused by key where it is wrong."""

from pathlib import Path

import pytest

from client import site_config as module
from client.site_config import SiteConfig, read_site_config, write_site_config
from common.errors import ConfigError

BASE = {"alias": "hospital-1", "data": "/data", "socket": "/run/w.sock", "home": "/home/w"}
SECRET = "Mueller_Hans"


def text(**changes):
    values = {key: value for key, value in (BASE | changes).items() if value is not None}
    return "".join(f'{key} = "{value}"\n' for key, value in values.items())


@pytest.fixture
def write(tmp_path):
    def put(content):
        path = tmp_path / SECRET / "site.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def test_the_example_in_the_docstring_is_a_site_configuration_and_shows_every_default(write):
    example = module.__doc__.partition("\n\n")[2]
    config = read_site_config(write(example))
    plain = SiteConfig.model_validate({key: getattr(config, key) for key in BASE})
    assert config == plain
    for section in (config, config.compute, config.policy):
        for name in type(section).model_fields:
            if name not in {"models", "events"}:
                assert f"{name} = " in example or f"[{name}]" in example


def test_what_is_written_is_read_again(tmp_path):
    config = SiteConfig.model_validate(
        BASE
        | {
            "models": "/m",
            "compute": {"device": "cuda:1", "threads": 2},
            "policy": {"methods": ["fedavg"], "min_cases": 5},
        }
    )
    write_site_config(config, tmp_path / "deep" / "site.toml")
    assert read_site_config(tmp_path / "deep" / "site.toml") == config
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["site.toml"]


def test_a_write_that_breaks_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "site.toml"
    write_site_config(SiteConfig.model_validate(BASE), path)

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_site_config(SiteConfig.model_validate(BASE | {"alias": "other"}), path)
    assert read_site_config(path).alias == "hospital-1"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (text(aliass="x"), r"Unknown key 'aliass'. Did you mean 'alias'\?"),
        (text() + "[compute]\ncach_mb = 3\n", r"Unknown key 'compute.cach_mb'. Did you mean 'cache_mb'\?"),
        (text() + "[policies]\n", r"Unknown key 'policies'. Did you mean 'policy'\?"),
        (text(alias=None), "'alias'"),
        (text(data=None), "'data'"),
        (text(socket=None), "'socket'"),
        (text(home=None), "'home'"),
        (text() + '[compute]\ndevice = "gpu"\n', "'compute.device'"),
        (text() + '[compute]\ndevice = "cuda:x"\n', "'compute.device'"),
        (text() + '[compute]\namp = "yes"\n', "'compute.amp'"),
        (text() + "[compute]\nthreads = -1\n", "'compute.threads'"),
        (text() + "[policy]\nmin_cases = 0\n", "'policy.min_cases'"),
        (text() + '[policy]\nkinds = "model"\n', "'policy.kinds'"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(write, content, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_site_config(write(content))


@pytest.mark.parametrize(
    "alias", ["", "-a", ".hidden", "../up", "a/b", "a b", "ä", "x" * 65, "a\\n", "a\\u0000"]
)
def test_an_alias_that_could_be_a_path_or_an_identifier_is_refused(write, alias):
    with pytest.raises(ConfigError, match="Bad value for 'alias'"):
        read_site_config(write(text(alias=alias)))


@pytest.mark.parametrize("alias", ["a", "7", "Charite.Berlin_2-b", "x" * 64])
def test_an_alias_may_have_letters_digits_dots_dashes_and_underscores(write, alias):
    assert read_site_config(write(text(alias=alias))).alias == alias


def test_kebab_case_is_read(write):
    assert read_site_config(write(text() + "[compute]\ncache-mb = 7\n")).compute.cache_mb == 7


@pytest.mark.parametrize(
    "content",
    [
        "alias = ",
        f'alias = "x"\n"{SECRET}" = 1\n"{SECRET}" = 2\n',
        b'alias = "M\xfcller"',
        "alias = 'a\n",
        b"\0",
    ],
)
def test_what_is_no_toml_is_refused_and_its_text_stays_in_the_detail(write, content):
    path = write(content)
    with pytest.raises(ConfigError, match="not valid TOML") as caught:
        read_site_config(path)
    assert SECRET not in str(caught.value)
    assert str(path) in caught.value.detail


@pytest.mark.parametrize("path", [f"/none/{SECRET}/site.toml", "/"])
def test_a_file_that_cannot_be_read_is_refused_without_its_path(path):
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_site_config(Path(path))
    assert SECRET not in str(caught.value)
    assert path in caught.value.detail
