"""A site's data: the folder, its formats, the batches made of it, and the check before a run.

Import the modules directly; this package imports nothing, so that the relay stays free of torch and MONAI.
"""
