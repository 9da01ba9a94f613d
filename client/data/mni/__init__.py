"""The default data: simulated hospitals on the MNI152 average brain, without a download."""

from client.data.mni.trial import write_mni_trial

__all__ = ["write_mni_trial"]
