"""The size of a payload by pFedNet's public measure, round by round: for comparison with its figures, for nothing else.

    for payload in decode(answer).payloads.values():      # answer: what a site sent, e.g. `server.link.Answer.parts`
        size = legacy_of(payload)                         # size.text, size.deflated; never mixed with bytes that travel

Nothing of it is in a message or in a run's events: it is what an update would have taken there, not here.
"""

from __future__ import annotations

import torch

from common.codecs import container
from common.codecs.legacy import LegacySize, legacy_size
from common.payload import Payload
from common.wire import Coded


def legacy_of(payload: Payload) -> LegacySize:
    """Measure a payload by pFedNet's public measure: DEFLATE of decimal text (common/codecs/legacy.py).

    Args:
        payload: As it travelled. Of a coded one the values that its bytes stand for are measured, so of a compressed
            answer the change T; of another one its float32 tensors, so of a model that travelled raw the model itself.

    Raises:
        PayloadError: Bytes that are not of the payload's codec, or that stand for more than 2^28 values.
    """
    if isinstance(payload, Coded):
        return legacy_size(container.decode(payload.codec, payload.data))
    return legacy_size(
        {name: tensor for name, tensor in payload.tensors.items() if tensor.dtype is torch.float32}
    )
