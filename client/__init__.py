"""The hospital: relay, worker, site, trainer, data. Importing it costs nothing; the relay lives without torch."""
