"""FedPer: personal layers never travel, with their running statistics; the base is FedAvg's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.config import DataConfig, ModelConfig
from common.errors import ConfigError
from common.methods.fedper import FedPerParams, FedPerServer, personal_keys
from common.models import build_model, parameter_groups, template
from common.store import tensor_bytes
from common.wire import decode
from tests.harness import Federation, table_config

PICTURES = DataConfig(
    task="classification", spatial_dims=2, channels=("r", "g", "b"), labels=("x", "y"), patch=(32, 32)
)
UNET = build_model(
    ModelConfig(name="unet", width=2, levels=3, norm="batch"), DataConfig(patch=(16, 16, 16)), seed=0
)
DENSENET = build_model(ModelConfig(name="densenet", width=4, levels=2), PICTURES, seed=0)


def config(method="fedper", **params):
    if method == "fedper":
        params.setdefault("personal", FedPerParams().personal)
    return table_config(method, **params).model_copy(update={"model": ModelConfig(name="mlp", hidden=(4,))})


def kept(network, *personal):
    return personal_keys(personal, network.state_dict(), parameter_groups(network))


def test_the_head_never_travels_and_the_rest_is_fedbns(tmp_path):
    federation = Federation(tmp_path)
    loop = federation.run(config())
    messages = [
        payload.tensors
        for _, round_, down, up in federation.link.seen
        for message in (down, up)
        for payload in decode(message).payloads.values()
        if round_
    ]
    assert len(messages) >= 3 * 3 * 2
    assert {name for tensors in messages for name in tensors} == {"body.0.weight", "body.0.bias"}
    own, shared = federation.personal(), loop.server.model(loop.state)
    for name in ("out.weight", "out.bias"):
        assert len({tensor_bytes({name: model[name]}) for model in own.values()}) == 3
    for model in own.values():
        assert all(torch.equal(model[name], tensor) for name, tensor in shared.items())
    named = Federation(tmp_path)
    named.run(config("fedbn", keep=["head"]), home="fedbn")
    for alias, model in named.personal("fedbn").items():
        assert tensor_bytes(model) == tensor_bytes(own[alias])


def test_batch_normalisation_of_the_base_is_shared_and_that_of_a_personal_layer_is_not():
    assert kept(DENSENET, "head") == {"class_layers.out.weight", "class_layers.out.bias"}
    server = FedPerServer(FedPerParams())
    travelling = server.travelling(template(DENSENET), parameter_groups(DENSENET))
    assert any(name.endswith("running_mean") for name in travelling)
    groups = parameter_groups(UNET)
    local = kept(UNET, "decoder", "head")
    assert local - set(groups["all"])  # the decoder has statistics, and they stay
    assert set(groups["buffers"]) - local  # the encoder's are shared
    assert local & set(groups["all"]) == {*groups["decoder"], *groups["head"]}
    assert kept(UNET, "head", "buffers") == {*groups["head"], *groups["buffers"]}


@settings(max_examples=25, deadline=None)
@given(st.sets(st.sampled_from(["head", "decoder", "norm", "buffers", "*.bias", "model.0.*"])))
def test_a_statistic_stays_where_it_is_named_or_all_parameters_of_its_layer_stay(personal):
    local = kept(UNET, *sorted(personal))
    alone = set().union(*(kept(UNET, entry) for entry in personal)) if personal else set()
    for place, module in UNET.named_modules():
        parameters = {f"{place}.{key}" for key, _ in module.named_parameters(recurse=False)}
        buffers = {f"{place}.{key}" for key, _ in module.named_buffers(recurse=False)}
        assert local & parameters == alone & parameters
        if isinstance(module, nn.BatchNorm3d) and parameters <= local:
            assert buffers <= local
        elif buffers:
            assert local & buffers == alone & buffers


def test_patterns_choose_by_name_and_what_means_nothing_is_refused():
    assert kept(DENSENET, "*.out.bias") == {"class_layers.out.bias"}
    assert kept(DENSENET) == set()
    with pytest.raises(ConfigError, match="Unknown parameter group 'haed'"):
        kept(DENSENET, "haed")


def test_a_network_without_a_base_is_refused_before_the_run(tmp_path):
    logistic = table_config("fedper", personal=FedPerParams().personal)
    with pytest.raises(ConfigError, match=r"leaves no base to share.*mlp.*local-only"):
        Federation(tmp_path).run(logistic)
    with pytest.raises(ConfigError, match="no base"):
        kept(UNET, "encoder", "decoder", "head")
