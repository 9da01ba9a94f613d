"""What both ends share. Importing it costs nothing; the relay lives without torch."""

__version__ = "0.1.0"
