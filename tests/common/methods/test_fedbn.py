"""FedBN: what is kept never travels, in either direction, and the rest is FedAvg."""

import pytest
import torch

from common.config import DataConfig, ModelConfig
from common.errors import ConfigError
from common.methods.fedbn import FEDBN, FedBNParams, FedBNServer, kept
from common.models import build_model, parameter_groups, template
from common.wire import decode
from tests.harness import Federation, table_config


def config(**params):
    base = table_config("fedbn", **params)
    return base.model_copy(update={"model": ModelConfig(name="mlp", hidden=(4,))})


def test_a_kept_head_never_travels_and_differs_between_sites(tmp_path):
    federation = Federation(tmp_path)
    settings = config(keep=["head"])
    head = parameter_groups(build_model(settings.model, settings.data, seed=0))["head"]
    loop = federation.run(settings)
    for _, _, down, up in federation.link.seen:
        for message in (down, up):
            for payload in decode(message).payloads.values():
                assert payload.tensors
                assert not [name for name in payload.tensors if name.startswith("head")]
    own = federation.personal()
    assert head
    assert not any(torch.equal(own["alpha"][name], own["beta"][name]) for name in head)
    shared = loop.server.model(loop.state)
    for model in own.values():
        assert all(torch.equal(model[name], tensor) for name, tensor in shared.items())


def test_running_statistics_are_kept_by_default():
    data = DataConfig(labels=("a", "b"), patch=(16, 16, 16))
    network = build_model(ModelConfig(name="unet", width=4, levels=2, norm="batch"), data, seed=0)
    groups = parameter_groups(network)
    local = kept(FedBNParams().keep, groups)
    assert {name for name, _ in network.named_buffers()} <= local
    travelling = FedBNServer(FedBNParams()).travelling(template(network), groups)
    assert travelling.keys() | local == network.state_dict().keys()
    assert not travelling.keys() & local
    statistics_only = kept(("buffers",), groups)
    assert statistics_only == {name for name, _ in network.named_buffers()}


def test_an_unknown_group_is_named():
    network = build_model(ModelConfig(width=4, levels=2), DataConfig(patch=(16, 16, 16)), seed=0)
    with pytest.raises(ConfigError, match="Unknown parameter group 'heads'"):
        kept(("heads",), parameter_groups(network))
    assert FEDBN.parse({"keep": ["head"]}).keep == ("head",)
