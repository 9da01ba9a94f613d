"""Ways to spoil a configuration, as JSON (the coordinator's) and as TOML (a hospital's).

A mutator takes a seeded `random.Random` and returns a text (or bytes) and what the refusal must name: the key, or words
that say what is wrong with the whole.
"""

import json
import random

import tomli_w

from tests.harness import table_config

NOT_JSON = "The run configuration is not JSON"
NOT_OBJECT = "must be a JSON object"
NOT_TOML = "not valid TOML in UTF-8"
SITE = {
    "alias": "hospital-1", "data": "/data", "socket": "/run/w.sock", "home": "/home/w",
    "compute": {"device": "cpu", "amp": "off", "threads": 1, "cache_mb": 64},
    "policy": {"methods": ["fedavg"], "kinds": ["*"], "min_cases": 2, "max_out_mb": 5.0, "max_in_mb": 5.0},
    "privacy": {"metrics": True, "metrics_min_cases": 2, "summary": "full", "clip_norm": 1.0},
}  # fmt: skip
OUT_OF_RANGE = {
    "version": [0, 2, -1], "seed": [-1, 2**32, 10**40], "data.task": ["detection", ""], "data.spatial_dims": [1, 4, -3],
    "data.patch": [[0], [8, -1]], "data.patches_per_case": [0, -5], "data.foreground_ratio": [-0.1, 1.1],
    "data.normalise": ["z", "CASE"], "data.missing": ["mean"], "data.spacing": [[1.0], [0], [-1, 1, 1]],
    "data.spacing_tolerance": [-1], "data.labels": [["one"], [], ["a", "a"]], "data.channels": [[], ["a", "a"]],
    "model.width": [0, -16], "model.levels": [1, 7], "model.norm": ["layer"], "model.dropout": [1.0, -0.5],
    "model.hidden": [[0], [32, -1]], "train.local_epochs": [0, 1.5], "train.batch_size": [0, -1],
    "train.optimizer": ["lbfgs"], "train.lr": [0, -0.1], "train.momentum": [1.0, -1], "train.weight_decay": [-1e-9],
    "train.clip_norm": [-1], "train.optimizer_state": ["stale"], "rounds.rounds": [0, -3, 2.5], "rounds.quorum": [0, 1.01],
    "rounds.deadline": [0, -1], "rounds.ready_timeout": [0], "rounds.retries": [-1], "rounds.retry_wait": [0, 61],
    "rounds.probe": [0], "rounds.sample": [0, 2], "rounds.poll": [0], "rounds.hd95": ["sometimes"],
    "guard.reduce": ["mean"], "guard.trim": [0.5, -0.1], "guard.update_ratio": [-1], "guard.rms": [-1],
}  # fmt: skip
SITE_OUT_OF_RANGE = {
    "alias": ["", ".x", "a b", "a/b", "x" * 65, "-x", "M\u00fcller", "a\n"], "compute.device": ["gpu", "cuda:", "CPU", "cpu\n"],
    "compute.amp": ["auto ", "bf16"], "compute.threads": [-1], "compute.cache_mb": [-5], "policy.min_cases": [0, -1],
    "policy.max_out_mb": [-1, -0.5], "policy.max_in_mb": [-1e-9], "privacy.metrics_min_cases": [0],
    "privacy.summary": ["none", "Counts"], "privacy.clip_norm": [-1],
}  # fmt: skip
FLOATS = (
    "train.lr",
    "train.momentum",
    "train.clip_norm",
    "rounds.quorum",
    "rounds.deadline",
    "guard.rms",
    "data.foreground_ratio",
)
SITE_FLOATS = ("policy.max_out_mb", "policy.max_in_mb", "privacy.clip_norm")


def run_document():
    return json.loads(table_config(sites=("alpha", "beta")).to_json())


def site_document():
    return json.loads(json.dumps(SITE))


def leaves(document, prefix=""):
    """Yield the dotted place of every value, without the method's own parameters."""
    for key, value in document.items():
        if isinstance(value, dict) and key != "params":
            yield from leaves(value, f"{prefix}{key}.")
        elif key != "params":
            yield prefix + key


def owner(document, place):
    *sections, leaf = place.split(".")
    for section in sections:
        document = document[section]
    return document, leaf


def put(document, place, value):
    home, leaf = owner(document, place)
    home[leaf] = value
    return document


def wrong_for(rng, value):
    """Return a value of a type that cannot be read as this one's."""
    choices = {
        bool: ["perhaps", 7, [True], {"a": 1}], int: ["many", [1], {"a": 1}, ""], float: ["fast", [0.1], {"a": 1}, ""],
        str: [3, 1.5, True, ["a"], {"a": "b"}], list: [5, "text", {"a": 1}, True], type(None): [{"a": 1}],
    }  # fmt: skip
    return rng.choice(choices[type(value)])


def nested(rng):
    """Return something deep; far from the interpreter's own limit, which has a test of its own."""
    depth = rng.choice([3, 20, 60])
    return (
        json.loads("[" * depth + "1" + "]" * depth)
        if rng.random() < 0.5
        else json.loads('{"a":' * depth + "1" + "}" * depth)
    )


class Spoiler:
    """The mutators that both kinds of documents share."""

    def __init__(self, make, dump, bad_values, floats):
        self.make, self.dump, self.bad_values, self.floats = make, dump, bad_values, floats

    def wrong_type(self, rng):
        document = self.make()
        place = rng.choice([place for place in leaves(document) if self.dumps_null or owner(document, place)])
        home, leaf = owner(document, place)
        home[leaf] = wrong_for(rng, home[leaf])
        return self.dump(document), place

    dumps_null = True

    def section_is_no_section(self, rng):
        document = self.make()
        section = rng.choice([key for key, value in document.items() if isinstance(value, dict)])
        document[section] = rng.choice([3, "text", [1], True])
        return self.dump(document), section

    def unknown_key(self, rng):
        document = self.make()
        section = rng.choice(
            [key for key, value in document.items() if isinstance(value, dict) and key != "params"] + [""]
        )
        key = rng.choice(["zeta", "lrr", "Rounds", "__class__", "alias2", "0"])
        (document[section] if section else document)[key] = rng.choice([1, "x", [], {}])
        return self.dump(document), f"Unknown key '{section}.{key}'" if section else f"Unknown key '{key}'"

    def out_of_range(self, rng):
        place = rng.choice(sorted(self.bad_values))
        document = put(self.make(), place, rng.choice(self.bad_values[place]))
        section = place.split(".")[
            0
        ]  # a rule over several keys of a section names the section, and the key in its words
        return self.dump(document), (
            f"'{place}",
            f"'{section}': Value error, {place.split('.')[-1]}",
            f"'{section}': Value error, patch",
        )

    def not_a_number(self, rng):
        place = rng.choice(self.floats)
        return self.dump(
            put(self.make(), place, rng.choice([float("nan"), float("inf"), float("-inf")]))
        ), place

    def deep(self, rng):
        place = rng.choice([place for place in leaves(self.make()) if place not in {"data.spacing"}])
        value = nested(rng)
        if rng.random() < 0.5:
            return self.dump(self.make() | {"deep": value}), "Unknown key 'deep'"
        return self.dump(put(self.make(), place, value)), place

    def written_twice(self, rng):
        document = self.make()
        place = rng.choice([place for place in leaves(document) if "_" in place.split(".")[-1]])
        home, leaf = owner(document, place)
        home[leaf.replace("_", "-")] = home[leaf]
        return self.dump(document), f"'{leaf}' is given twice"

    def enormous_number(self, rng):
        place = rng.choice(self.floats)
        return self.dump(put(self.make(), place, 10 ** rng.choice([400, 600]))), place

    def several(self, rng):
        """Several things wrong at once: one of them is named."""
        document, places = self.make(), rng.sample(sorted(self.bad_values), 3)
        for place in places:
            put(document, place, rng.choice(self.bad_values[place]))
        return self.dump(document), tuple(place.split(".")[0] for place in places)


RUN = Spoiler(run_document, json.dumps, OUT_OF_RANGE, FLOATS)
TOML = Spoiler(site_document, tomli_w.dumps, SITE_OUT_OF_RANGE, SITE_FLOATS)


def cut_json(rng):
    text = json.dumps(run_document())
    return text[: rng.randrange(1, len(text) - 1)], NOT_JSON


def no_json(rng):
    text = json.dumps(run_document())
    place = rng.randrange(len(text))
    spoilt = [
        "\0" + text, text + "}", text + text, "'" + text, text.replace('"', "'"), text.replace(":", "=", 1),
        "\ufeff" + text, "{" + "1" * 5000 + "}", '{"seed": ' + "1" * 5000 + "}", "[" * 100_000, text[:place] + "\x01" + text[place:],
    ]  # fmt: skip
    return rng.choice(spoilt[:-1]), NOT_JSON


def no_object(rng):
    return rng.choice(["[]", "3", '"text"', "null", "true", "[{}]", "1e999", "NaN"]), NOT_OBJECT


def other_version(rng):
    return json.dumps(
        put(run_document(), "version", rng.choice([0, 2, "2", 1.5, None, [1], "one"]))
    ), "'version'"


def cut_toml(rng):
    """Cut inside a quoted text or behind an equals sign."""
    text = tomli_w.dumps(SITE)
    ends = [index + 1 for index, letter in enumerate(text) if letter in '="']
    inside = [end for end in ends if text[:end].count('"') % 2 or text[end - 1] == "="]
    return text[: rng.choice(inside)], NOT_TOML


def no_toml(rng):
    text = tomli_w.dumps(SITE).encode()
    place = text.index(b"hospital")
    texts = [
            text[:place] + b"\xfc" + text[place:], text.decode().encode("utf-16"), b"\0" * 20, b"\xef\xbb\xbf" + text,
            text[:place] + b"\x07" + text[place:], b'alias = "x"\n' + text, text + b"[compute]\n", text + b"= 3\n",
            json.dumps(SITE).encode(), b"alias: x\n", text + b"threads = " + b"9" * 5000 + b"\n", b"\xff\xfe" + rng.randbytes(50),
    ]  # fmt: skip
    return rng.choice(texts), NOT_TOML


def missing_key(rng):
    document = site_document()
    place = rng.choice(["alias", "data", "socket", "home"])
    del document[place]
    return tomli_w.dumps(document), f"'{place}': Field required"


def methods_of(spoiler):
    names = (
        "wrong_type", "section_is_no_section", "unknown_key", "out_of_range", "not_a_number", "deep", "written_twice",
        "enormous_number", "several",
    )  # fmt: skip
    return {name: getattr(spoiler, name) for name in names}


RUNS = methods_of(RUN) | {
    function.__name__: function for function in (cut_json, no_json, no_object, other_version)
}
SITES = methods_of(TOML) | {function.__name__: function for function in (cut_toml, no_toml, missing_key)}


def spoil_config(mutators, seed: int):
    """Return the name of a mutator, the text it makes, and what the refusal may say (a tuple)."""
    name = list(mutators)[seed % len(mutators)]
    text, said = mutators[name](random.Random(seed))
    return name, text, (said,) if isinstance(said, str) else said
